"""Wheels for another machine's Python, as pip chooses them there, fetched by the pip of this one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from toolkit import process
from toolkit.devices.probe import Probe
from toolkit.errors import StageError, UsageError

# what comes as source alone, of pure Python, and is made a wheel of here
_SOURCES = ("tensorrt-rtx-cu13",)


def gather(requirements: Mapping[str, str], found: Probe, cache: Path, source: Path | None) -> list[Path]:
    """Return the wheels that a device's Python needs, dependencies and pip itself included.

    Args:
        requirements: Packages with their versions, as pip writes them (``==12.*``, or nothing).
        found: The device; its Python, processor and C library decide.
        cache: Folder where wheels are kept; what was fetched once is not asked for again.
        source: Folder to take the wheels from, instead of pip's index.

    Raises:
        UsageError: ``source`` is no folder.
        StageError: A wheel cannot be had.
    """
    if source is not None and not source.is_dir():
        raise UsageError(f"--wheels {source} is not a folder", "name the folder that the wheels lie in")
    wanted = [f"{name}{version}" for name, version in sorted(requirements.items())] + ["pip"]
    choice = _choice(found)
    there = (
        [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _wheels(source)] if source else None
    )
    key = hashlib.sha256(json.dumps([wanted, choice, there]).encode()).hexdigest()[:16]
    folder, partial = cache / key, cache / f"{key}.partial"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{key}.lock"):
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            where = ["--no-index", "--find-links", str(source)] if source else ["--find-links", str(partial)]
            for name in _SOURCES if source is None else ():
                if name in requirements:
                    named = name + requirements[name]
                    _pip(["wheel", "--no-deps", "--wheel-dir", str(partial), named], found, source)
            _pip(["download", *where, *choice, "--dest", str(partial), *wanted], found, source)
            partial.rename(folder)
    return _wheels(folder)


def _wheels(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.whl"))


def installed_bytes(wheel: Path) -> int:
    """Return what a wheel takes once it is installed, with the bytecode that pip makes."""
    with zipfile.ZipFile(wheel) as archive:
        return sum(entry.file_size * (2 if entry.filename.endswith(".py") else 1) for entry in archive.infolist())


def _choice(found: Probe) -> list[str]:
    """Return pip's options for what a device's own pip would take, newest C library first (PEP 600, PEP 656)."""
    assert found.python
    major, minor = found.python.split(".")[:2]
    kind, _, version = (found.libc or "").partition(" ")
    numbers = [int(part) for part in version.split(".")[:2]] if version else [0, 0]
    if kind == "glibc":
        platforms = [f"manylinux_{numbers[0]}_{n}" for n in range(numbers[1], 16, -1)] + ["manylinux2014"]
    elif kind == "musl":
        platforms = [f"musllinux_{numbers[0]}_{n}" for n in range(numbers[1], 0, -1)]
    else:
        platforms = ["linux"]
    options = ["--only-binary=:all:", "--implementation", "cp", "--abi", f"cp{major}{minor}"]
    options += ["--python-version", found.python]
    for platform in platforms:
        options += ["--platform", f"{platform}_{found.arch}"]
    return options


def _pip(arguments: Sequence[str], found: Probe, source: Path | None) -> None:
    finished = process.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments])
    if finished.returncode == 0:
        return
    said = finished.stderr
    if "No module named pip" in said:
        raise StageError("the toolkit's Python has no pip to fetch wheels with", f"{sys.executable} -m ensurepip")
    device = f"Python {found.python} on {found.arch} with {found.libc or 'an unknown C library'}"
    if "ConnectionError" in said or "Retrying (" in said:
        raise StageError(
            f"wheels for {device} cannot be fetched: pip reaches no package index",
            "fetch them where there is one (toolkit provision there keeps them in build/wheels), "
            "and name the folder: --wheels DIR",
        )
    if missing := re.search(r"No matching distribution found for (\S+)", said):
        raise StageError(
            f"there is no wheel of {missing[1]} for {device}" + (f" in {source}" if source else ""),
            "put one into a folder with the others and name it (--wheels DIR), or name another Python there "
            "(python: in the target file)",
        )
    lines = [line for line in said.splitlines() if line.startswith("ERROR:")] or said.splitlines() or ["nothing"]
    raise StageError(
        f"wheels for {device} cannot be fetched; pip says: {lines[0].removeprefix('ERROR: ')}",
        "check that pip download works on this machine",
    )
