"""Artifacts: folders named by the hash of what went into them, written whole or not at all.

`ROOT/<stage>/<key>/` holds an artifact's files and `artifact.json`. A stage writes into `ROOT/.partial/`,
keeps what lets it continue after a break in `ROOT/.resume/`, and the finished folder is renamed into place:
a folder that exists is whole. One writer a key, by a file lock that ends with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from toolkit.errors import StageError, UsageError, disk_errors

log = logging.getLogger(__name__)

FORMAT = 1
_RECORDED = ("torch", "torchvision", "nvidia-modelopt", "torchprofile", "onnx", "onnxruntime", "numpy")

Progress = Callable[[int, int, str], None]


class DamagedError(Exception):
    """An artifact is not what its record says."""


def canonical(value: Any) -> str:
    """Return JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_text(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@dataclass(frozen=True)
class Artifact:
    """A finished stage's folder.

    Attributes:
        digest: Hash of the files and of ``meta``; equal results have equal digests, whenever they were made.
        meta: What later stages need to know without opening a file.
        versions: Of Python and the libraries that it was made with.
    """

    stage: str
    key: str
    path: Path
    digest: str
    meta: dict[str, Any]
    files: dict[str, dict[str, Any]]
    fast: bool
    seconds: float
    created: str
    cached: bool = True
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def pending(cls, stage: str) -> Artifact:
        """Return what stands in a plan for an artifact that is not there yet."""
        return cls(stage, "", Path(), "", {}, {}, fast=False, seconds=0.0, created="", cached=False)

    @property
    def is_pending(self) -> bool:
        """Whether it is not there yet."""
        return not self.key

    def file(self, name: str) -> Path:
        """Return the path of one of its files."""
        return self.path / name

    def sha256(self, name: str) -> str:
        """Return the recorded SHA-256 of one of its files."""
        return str(self.files[name]["sha256"])


@dataclass
class Work:
    """What a stage gets to work with.

    Attributes:
        out: Empty folder for the artifact's files.
        resume: Folder that outlives an interruption, for checkpoints.
        progress: Called with done, total and a short text.
    """

    out: Path
    resume: Path
    progress: Progress = field(default=lambda done, total, text: None)


class Store:
    """All artifacts below one folder.

    Args:
        root: The folder; made when it is missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._making: set[tuple[str, str]] = set()
        self._remade: set[tuple[str, str]] = set()
        self._ready = False
        marker = root / "store.json"
        try:
            version = json.loads(marker.read_text())["format"] if marker.exists() else FORMAT
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{marker} is not a store's marker: {error}", "move it away") from error
        if version != FORMAT:
            raise UsageError(
                f"{root} is a store of format {version}; this version reads format {FORMAT}",
                "use the newer version, or another folder (--build DIR)",
            )

    @property
    def searches(self) -> Path:
        """Folder of what pruners' searches have found out, which all budgets of a baseline share."""
        return self.root / ".search"

    def _make_ready(self) -> None:
        """Make the folders when something is first written."""
        if self._ready:
            return
        for folder in (".partial", ".resume", ".locks"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        if not (self.root / "store.json").exists():
            write_json(self.root / "store.json", {"format": FORMAT})
        self._ready = True

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep garbage collection away while a run reads and writes here."""
        with disk_errors(self.root, "the store"):
            self._make_ready()
            descriptor = os.open(self.root / ".locks" / "users", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def unused(self) -> Iterator[None]:
        """Keep runs away while something is removed here; raises StageError when one is using the store."""
        self._make_ready()
        descriptor = os.open(self.root / ".locks" / "users", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise StageError(f"a run is using {self.root}", "collect garbage when it has ended") from None
        finally:
            os.close(descriptor)

    @staticmethod
    def key(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> str:
        """Return the key: a hash of the stage, its version, its configuration and its inputs' contents."""
        digests = {name: artifact.digest for name, artifact in inputs.items()}
        return sha256_text(canonical([FORMAT, stage, version, config, digests]))[:20]

    def lookup(self, stage: str, key: str) -> Artifact | None:
        """Return a finished artifact after checking every file's hash, or None where there is none.

        Raises:
            DamagedError: A file is missing, altered or truncated, or the record itself is.
        """
        path = self.root / stage / key
        if not path.is_dir():
            return None
        record = _read_record(path / "artifact.json")
        present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        for name, entry in record["files"].items():
            if name not in present:
                raise DamagedError(f"{path / name} is missing")
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                raise DamagedError(f"{path / name} has {size} bytes instead of {entry['bytes']}")
            if sha256_file(path / name) != entry["sha256"]:
                raise DamagedError(f"{path / name} was altered: its SHA-256 is not the recorded one")
        keys = ("digest", "meta", "files", "fast", "seconds", "created", "versions")
        return Artifact(stage, key, path, **{name: record[name] for name in keys})

    def produce(
        self,
        stage: str,
        key: str,
        make: Callable[[Work], dict[str, Any]],
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        fast: bool = False,
        amount: float | None = None,
        rerun: bool = False,
        stale: Callable[[Artifact], bool] = lambda found: False,
        progress: Progress = lambda done, total, text: None,
        warn: Callable[[str], None] = log.warning,
    ) -> Artifact:
        """Return the artifact, made by ``make`` unless a whole one is there.

        Args:
            stage: Stage name.
            key: From :meth:`key`.
            make: Writes the files into ``work.out`` and returns ``meta``.
            config: Recorded beside the result.
            inputs: Recorded beside the result.
            fast: Whether the result comes from a fast run.
            amount: How much work it is, in a unit of the stage's own; later plans estimate time from it, where it
                was done in one go.
            rerun: Make it anew even where it is; once by this store object, which the hosts of a fleet share.
            stale: Whether one that is there has to be made anew nevertheless.
            progress: Handed to ``make``.
            warn: Told of a damaged artifact and of waiting for another process.
        """
        with disk_errors(self.root, f"stage '{stage}'"), self._locked(stage, key, progress, warn):
            if not rerun or (stage, key) in self._remade:
                try:
                    found = self.lookup(stage, key)
                    if found and not stale(found):
                        return found
                except DamagedError as damage:
                    warn(f"{damage}; the stage '{stage}' runs again")
            name = f"{stage}-{key}"
            work = Work(self.root / ".partial" / name, self.root / ".resume" / name, progress)
            shutil.rmtree(work.out, ignore_errors=True)
            work.out.mkdir(parents=True)
            work.resume.mkdir(exist_ok=True)
            if any(work.resume.iterdir()):  # what was done before is not in this one's time
                amount = None
            started = time.monotonic()
            meta = make(work)
            artifact = self._commit(
                stage, key, work, meta, time.monotonic() - started, config, inputs, fast, amount
            )
            shutil.rmtree(work.resume, ignore_errors=True)
            if rerun:
                self._remade.add((stage, key))
            return artifact

    def _commit(
        self,
        stage: str,
        key: str,
        work: Work,
        meta: dict[str, Any],
        seconds: float,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        fast: bool,
        amount: float | None,
    ) -> Artifact:
        meta = json.loads(canonical(meta))
        files = {}
        for path in sorted(work.out.rglob("*")):
            if path.is_file():
                _fsync(path)
                files[str(path.relative_to(work.out))] = {
                    "sha256": sha256_file(path),
                    "bytes": path.stat().st_size,
                }
        record: dict[str, Any] = {
            "stage": stage,
            "key": key,
            "digest": sha256_text(canonical([files, meta])),
            "meta": meta,
            "files": files,
            "fast": fast,
            "config": config,
            "inputs": {name: {"stage": a.stage, "key": a.key, "digest": a.digest} for name, a in inputs.items()},
            "seconds": round(seconds, 3),
            "amount": amount,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": platform.node(),
            "versions": _versions(),
        }
        write_json(work.out / "artifact.json", record | {"seal": sha256_text(canonical(record))})
        _fsync(work.out)
        return Artifact(
            stage,
            key,
            self._place(stage, key, work.out),
            record["digest"],
            meta,
            files,
            fast,
            record["seconds"],
            record["created"],
            cached=False,
            versions=record["versions"],
        )

    def _place(self, stage: str, key: str, out: Path) -> Path:
        """Move a finished folder to where it belongs, in the place of what is there."""
        final = self.root / stage / key
        final.parent.mkdir(exist_ok=True)
        if final.exists():
            aside = self.root / ".partial" / f"{stage}-{key}.old"
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
            out.rename(final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            out.rename(final)
        _fsync(final.parent)
        return final

    def receive(self, stage: str, key: str, fill: Callable[[Path], None]) -> None:
        """Take over an artifact of another store, unless it is there.

        Args:
            stage: Stage name.
            key: Its key.
            fill: Writes the artifact's files, its record among them, into an empty folder.

        Raises:
            DamagedError: It has not come whole.
        """
        with self._locked(stage, key, lambda done, total, text: None, log.warning):
            with contextlib.suppress(DamagedError):
                if self.lookup(stage, key):
                    return
            out = self.root / ".partial" / f"{stage}-{key}"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            fill(out)
            self._place(stage, key, out)
            self.lookup(stage, key)

    @contextmanager
    def _locked(self, stage: str, key: str, progress: Progress, warn: Callable[[str], None]) -> Iterator[None]:
        self._make_ready()
        lock = FileLock(self.root / ".locks" / f"{stage}-{key}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if (stage, key) in self._making:
                progress(0, 0, "waiting: it is being made for another host")
            else:
                warn(f"another process is at work on '{stage}'; waiting for its result")
            lock.acquire()
        self._making.add((stage, key))
        try:
            yield
        finally:
            self._making.discard((stage, key))
            lock.release()

    def records(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield every artifact's folder and record; a damaged record is left out."""
        for path in sorted(self.root.glob("[!.]*/*/artifact.json")):
            try:
                yield path.parent, _read_record(path)
            except DamagedError as damage:
                log.warning("%s", damage)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        seal = record.pop("seal")
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except (ValueError, KeyError, AttributeError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    if seal != sha256_text(canonical(record)):
        raise DamagedError(f"{path} was altered: its seal does not fit")
    return dict(record)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
