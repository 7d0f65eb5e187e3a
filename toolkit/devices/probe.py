"""What a device is, asked in one round trip of its shell alone: nothing is installed there, not even Python."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.agent import facts
from toolkit.devices import Device
from toolkit.errors import StageError

_SCRIPT = Path(__file__).with_name("probe.sh")
_TIMEOUT = 60.0
_DISTRIBUTIONS = ("numpy", *(name for names in facts.DISTRIBUTIONS.values() for name in names))


@dataclass(frozen=True)
class Probe:
    """A device as its shell sees it; what does not apply or is not known is None.

    What the agent's ``facts.collect`` tells too has the same name and form here.

    Attributes:
        distribution: ``Ubuntu 22.04.5 LTS``.
        place: The release root, or the nearest folder above it that is there.
        writable: Whether this user can write to ``place``.
        free_bytes: Free space at ``place``.
        libc: ``glibc 2.36`` or ``musl 1.2.3``.
        python: Version of the Python that would run the agent.
        numpy: Version of its NumPy.
        gpu_problem: What nvidia-smi said instead of naming a GPU.
        container: The container engine that would be used: ``docker`` or ``podman``.
        container_problem: Why it does not answer.
        container_gpu: Whether it can give the GPU to a container.
        power_set: Who may set the power mode: ``root`` (this user), ``sudo`` (without a password), ``no``.
        clocks: Who may lock clocks, likewise.
        temperature: The hottest sensor, in °C.
        load: Running processes, averaged over a minute.
        skew: Seconds that its clock is ahead, negative behind; 0 where it may be right.
        provisioned: What the provisioned environment was made for, as the agent's ``environments`` wrote it down.
        current: The current release.
        guarded: Whether it takes only signed releases.
        holder: Who holds its lease, with since and until by its own clock.
        locked: Whether somebody holds the release root's lock.
        lock_holder: Its process, where that is known.
    """

    arch: str
    os: str
    distribution: str | None
    cpu: str
    cores: int
    memory_bytes: int
    place: str
    writable: bool
    free_bytes: int | None
    libc: str | None
    python: str | None
    numpy: str | None
    runtimes: dict[str, str]
    tensorrt_python: bool
    trtexec: str | None
    gpus: list[dict[str, Any]]
    gpu_problem: str | None
    driver: str | None
    cuda: str | None
    l4t: str | None
    jetpack: str | None
    power_mode: str | None
    power_set: str | None
    clocks: str | None
    container: str | None
    container_problem: str | None
    container_gpu: bool
    temperature: float | None
    load: float | None
    skew: float | None
    provisioned: dict[str, Any] | None
    current: str | None
    guarded: bool
    holder: str | None
    locked: bool
    lock_holder: int | None


def probe(device: Device, python: str | None = None) -> Probe:
    """Ask a device what it is.

    Args:
        device: The device.
        python: The Python there that is examined; the one that the agent runs on by default.

    Raises:
        StageError: It cannot be reached, or has no POSIX shell.
    """
    lines: list[str] = []
    seen: list[float] = []

    def hear(line: str) -> None:
        lines.append(line)
        if line.startswith("time="):
            seen.append(time.time())

    sent = time.time()
    argv = ["sh", "-s", device.root, python or device.python, *_DISTRIBUTIONS]
    finished = device.run(argv, stdin=_SCRIPT.read_text(encoding="utf-8"), on_line=hear, timeout=_TIMEOUT)
    if "end=yes" not in lines:
        said = (finished.stderr.strip().splitlines() or lines or ["it said nothing"])[-1]
        raise StageError(
            f"{device.name} could not be examined (exit {finished.returncode}): {said}",
            "its user needs a POSIX shell (sh) that runs commands",
        )
    return parse(lines, sent, seen[0] if seen else time.time())


def parse(lines: Sequence[str], sent: float, seen: float) -> Probe:
    """Make facts of what ``probe.sh`` printed.

    Args:
        lines: Its output; what is not ``key=value`` is a greeting of the shell's.
        sent: When it was asked, in seconds of the host's clock.
        seen: When its first line, the time, was heard.
    """
    found: dict[str, list[str]] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if equals and value.strip():
            found.setdefault(key, []).append(value.strip())
    one = {key: values[0] for key, values in found.items()}

    packages = dict(line.split(" ", 1) for line in found.get("package", ()))
    memory = int(one.get("memory_kb", 0)) * 1024
    # name, compute capability and memory are what the agent asks for; the temperature is for the doctor
    cards = [line.split(",") for line in found.get("gpu", ())]
    gpus = facts.nvidia_smi("\n".join(",".join(card[:3]) for card in cards))
    gpus = gpus or facts.tegra_gpu(one.get("compatible", ""), one.get("model", ""), memory)
    temperatures = [int(value) / 1000 for value in found.get("millidegrees", ()) if value.isdigit()]
    temperatures += [float(card[3]) for card in cards if len(card) > 3 and card[3].strip().isdigit()]
    l4t = facts.tegra_release(one.get("tegra", ""))
    free = re.search(r"\s(\d+)\s+\S+\s+/", one.get("df", ""))
    container = "docker" if "docker" in one else "podman" if "podman" in one else None
    return Probe(
        arch=one.get("arch", "unknown"),
        os=one.get("os", "unknown"),
        distribution=one.get("distribution"),
        cpu=facts.processor(one.get("processor") or one.get("arch", ""), one.get("flags", "")),
        cores=int(one.get("cores", 1)),
        memory_bytes=memory,
        place=one.get("place", "/"),
        writable="writable" in one,
        free_bytes=int(free.group(1)) * 1024 if free else None,
        libc=one.get("libc"),
        python=one.get("python"),
        numpy=packages.get("numpy"),
        runtimes=_runtimes(packages, found.get("debian", ()), one.get("trtexec")),
        tensorrt_python="tensorrt_python" in one,
        trtexec=one.get("trtexec"),
        gpus=gpus,
        gpu_problem=None if gpus else one.get("gpu"),
        driver=facts.driver(one.get("driver", "")),
        cuda=facts.cuda(one.get("cuda", "")),
        l4t=l4t,
        jetpack=facts.jetpack(l4t) if l4t else None,
        power_mode=facts.power_mode(one.get("power", "")),
        power_set=one.get("power_set"),
        clocks=one.get("clocks"),
        container=container or ("docker" if "docker_problem" in one else None),
        container_problem=None if container else one.get("docker_problem"),
        container_gpu=_gives_gpu(container, one),
        temperature=max(temperatures, default=None),
        load=float(one["load"]) if "load" in one else None,
        skew=_skew(int(one["time"]), sent, seen) if one.get("time", "").isdigit() else None,
        provisioned=_document(one.get("environment", "")),
        current=one.get("current"),
        guarded="guarded" in one,
        holder=_holder(one),
        locked=any(line.startswith("locked=") for line in lines),
        lock_holder=int(holder.group()) if (holder := re.match(r"\d+", one.get("locked", ""))) else None,
    )


def _holder(one: Mapping[str, str]) -> str | None:
    """Return who holds the lease that the agent wrote, unless it has expired by the clock that counts."""
    lease = _document(one.get("lease", ""))
    if lease is None or lease["boot"] != one.get("boot") or lease["expires"] <= float(one["uptime"]):
        return None
    return f"{lease['holder']} since {lease['since']}, until {lease['until']} if it is not renewed"


def _runtimes(packages: Mapping[str, str], debian: Sequence[str], trtexec: str | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for runtime, names in facts.DISTRIBUTIONS.items():
        version = next((packages[name] for name in names if name in packages), None)
        if version is not None:
            found[runtime] = version
    version = facts.debian_tensorrt("\n".join(debian), found.get("tensorrt", ""))
    if version is not None or ("tensorrt" not in found and trtexec is not None):
        found["tensorrt"] = version or "of unknown version"
    return found


def _document(text: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(text))
    except ValueError:
        return None


def _gives_gpu(container: str | None, one: Mapping[str, str]) -> bool:
    """Tell whether containers can have the GPU, by what :func:`toolkit.containers.find_engine` goes by."""
    if container == "docker":
        return "nvidia" in one["docker"].split() or "hook" in one
    return container == "podman" and "cdi" in one


def _skew(device: int, sent: float, seen: float) -> float:
    """Return how far a clock's whole second lies outside the time in which it was read."""
    if device > seen:
        return round(device - seen, 1)
    return round(min(device + 1 - sent, 0.0), 1)
