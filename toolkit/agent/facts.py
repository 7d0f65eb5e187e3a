"""What the device is: read from the standard library and /proc, in a few milliseconds."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from typing import Any

_RUNTIMES = ("onnxruntime",)


def _proc(path: str, key: str) -> str:
    """Return the value of the first ``key: value`` line of a file in /proc, or an empty string."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    except OSError:
        return ""
    return ""


def cpu() -> str:
    """Return the processor's name with a hash of its instruction set."""
    flags = _proc("/proc/cpuinfo", "flags") or _proc("/proc/cpuinfo", "Features")
    name = _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    return "{} ({})".format(name, hashlib.sha256(flags.encode()).hexdigest()[:8])


def runtimes() -> dict[str, Any]:
    """Return the version of every runtime that is installed for this Python."""
    from importlib import metadata

    found = {}
    for name in _RUNTIMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> int:
    """Return this process's peak resident memory in bytes.

    ``VmHWM`` belongs to the program that runs now; ``ru_maxrss`` would include what its parent had before exec.
    """
    return int((_proc("/proc/self/status", "VmHWM") or "0 kB").split()[0]) * 1024


def collect(request: dict[str, Any]) -> dict[str, Any]:
    """Return the facts; ``root`` in the request is where releases live.

    Returns:
        ``arch``, ``cpu``, ``cores``, ``memory_bytes``, ``free_bytes``, ``os``, ``python``, ``runtimes``.
    """
    place = request["root"]
    while not os.path.isdir(place):
        place = os.path.dirname(place) or "."
    return {
        "arch": platform.machine(),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int((_proc("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) * 1024,
        "free_bytes": shutil.disk_usage(place).free,
        "os": "{} {}".format(platform.system(), platform.release()),
        "python": platform.python_version(),
        "runtimes": runtimes(),
    }
