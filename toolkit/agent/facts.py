"""What the device is: read from the standard library, /proc, /etc and NVIDIA's own tools."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from typing import Any

# distributions that a runtime comes in, the one whose version has the build number first
DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt-cu13-libs", "tensorrt-cu12-libs", "tensorrt-libs", "tensorrt"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu12-libs", "tensorrt-rtx"),
}
# L4T release to JetPack, NVIDIA's archive of JetPack releases; the longest prefix counts
_JETPACK = {
    "35.1": "5.0.2", "35.2": "5.1", "35.3": "5.1.1", "35.4": "5.1.2", "35.5": "5.1.3", "35.6": "5.1.4",
    "36.2": "6.0", "36.3": "6.0", "36.4": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "36.4.7": "6.2.1",
    "36.5": "6.2.2",
    "38.2": "7.0", "38.4": "7.1", "39": "7.2",
}  # fmt: skip
# Tegra chips, as the device tree spells them, with their GPU's compute capability
_TEGRA = {"tegra194": "sm_72", "tegra234": "sm_87", "tegra264": "sm_110"}


def _read(path: str) -> str:
    """Return a file's text, or an empty string where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().replace("\0", " ")
    except OSError:
        return ""


def _proc(path: str, key: str) -> str:
    """Return the value of the first ``key: value`` line of a file in /proc, or an empty string."""
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def output_of(*argv: str) -> str:
    """Return what a program prints, or an empty string where it is missing or fails within 20 s."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""


def processor(name: str, flags: str) -> str:
    """Return a processor's name with a hash of its instruction set."""
    return "{} ({})".format(name, hashlib.sha256(flags.encode()).hexdigest()[:8])


def cpu() -> str:
    """Return this processor's name with a hash of its instruction set."""
    name = _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    return processor(name, _cpu_flags())


def _cpu_flags() -> str:
    return _proc("/proc/cpuinfo", "flags") or _proc("/proc/cpuinfo", "Features")


def vector_bits(flags: str) -> int | None:
    """Return the width of a processor's widest vector registers by the flags in /proc/cpuinfo; None if unknown."""
    listed = set(flags.split())
    widths = {512: {"avx512f"}, 256: {"avx", "avx2"}, 128: {"sse2", "asimd", "neon"}}
    return next((bits for bits, names in widths.items() if names & listed), None)


def jetpack(l4t: str) -> str | None:
    """Return the JetPack release that an L4T release (``36.4.3``) belongs to."""
    known = [prefix for prefix in _JETPACK if l4t == prefix or l4t.startswith(prefix + ".")]
    return _JETPACK[max(known, key=len)] if known else None


def tegra_release(text: str) -> str | None:
    """Return the L4T release that ``/etc/nv_tegra_release`` names: ``# R36 (release), REVISION: 4.3, ...``."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return "{}.{}".format(*found.groups()) if found else None


def nvidia_smi(text: str) -> list[dict[str, Any]]:
    """Return the GPUs of ``nvidia-smi --query-gpu=name,compute_cap,memory.total --format=csv,noheader,nounits``."""
    gpus = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 3 and re.match(r"\d+\.\d+$", fields[1]):
            memory = int(fields[2]) << 20 if fields[2].isdigit() else None
            capability = "sm_" + fields[1].replace(".", "")
            gpus.append({"name": fields[0], "compute_capability": capability, "memory_bytes": memory})
    return gpus


def tegra_gpu(compatible: str, model: str, memory_bytes: int) -> list[dict[str, Any]]:
    """Return the GPU of a Jetson, which shares the memory, by its device tree's ``compatible`` and ``model``."""
    for chip, capability in _TEGRA.items():
        if "nvidia," + chip in compatible:
            name = model.strip() or chip
            return [{"name": name, "compute_capability": capability, "memory_bytes": memory_bytes}]
    return []


def gpus() -> list[dict[str, Any]]:
    """Return name, compute capability and memory of each GPU; empty where there is none, or no driver."""
    found = nvidia_smi(
        output_of("nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits")
    )
    if found:
        return found
    return tegra_gpu(_read("/proc/device-tree/compatible"), _read("/proc/device-tree/model"), _memory())


def _memory() -> int:
    return int((_proc("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) * 1024


def debian_tensorrt(packages: str, bindings: str) -> str | None:
    """Return TensorRT's version with its build number, from Debian's packages: ``libnvinfer10 10.3.0.30-1``.

    Args:
        packages: A package and its version a line.
        bindings: Version of the Python bindings, which the package has to agree with; empty without them.
    """
    for line in packages.splitlines():
        package, _, version = line.partition(" ")
        version = version.partition("-")[0]
        if re.match(r"libnvinfer(\d+|-bin)$", package) and version.startswith(bindings):
            return version
    return None


def runtimes() -> dict[str, Any]:
    """Return the version of every runtime that is installed, TensorRT's with its build number where it is known."""
    from importlib import metadata

    from . import trtexec

    found: dict[str, Any] = {}
    for name, distributions in DISTRIBUTIONS.items():
        for distribution in distributions:
            try:
                found[name] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            break
    # Debian's packages know the build number that JetPack's Python bindings do not tell: 10.3.0.30-1+cuda12.5
    packages = output_of("dpkg-query", "-W", "-f", "${Package} ${Version}\n", "libnvinfer*")
    version = debian_tensorrt(packages, found.get("tensorrt", ""))
    if version is not None:
        found["tensorrt"] = version
    program = trtexec.find()
    if program is not None and "tensorrt" not in found:
        found["tensorrt"] = ".".join(str(part) for part in trtexec.version(program))
    return found


def peak_memory() -> int:
    """Return this process's peak resident memory in bytes.

    ``VmHWM`` belongs to the program that runs now; ``ru_maxrss`` would include what its parent had before exec.
    """
    return int((_proc("/proc/self/status", "VmHWM") or "0 kB").split()[0]) * 1024


def cuda(text: str) -> str | None:
    """Return the version that ``/usr/local/cuda/version.json`` names."""
    try:
        return str(json.loads(text)["cuda"]["version"])
    except (ValueError, KeyError):
        return None


def driver(text: str) -> str | None:
    """Return the version that ``/proc/driver/nvidia/version`` names."""
    found = re.search(r"Kernel Module\b.*?\s(\d+\.[\d.]+)", text)
    return found.group(1) if found else None


def power_mode(text: str) -> str | None:
    """Return the mode that ``nvpmodel -q`` names."""
    found = re.search(r"NV Power Mode:\s*(\S+)", text)
    return found.group(1) if found else None


def collect(request: dict[str, Any]) -> dict[str, Any]:
    """Return the facts; ``root`` in the request is where releases live.

    Returns:
        ``arch``, ``cpu``, ``vector_bits`` (of its widest registers), ``cores``, ``memory_bytes``, ``free_bytes``,
        ``os``, ``python``, ``runtimes`` (name to version), ``gpus`` (``name``, ``compute_capability``,
        ``memory_bytes`` each), ``driver``, ``cuda``, ``l4t``, ``jetpack``, ``power_mode``, ``container`` (image
        that this runs in), ``trtexec`` (path), ``tensorrt_python`` (whether the bindings are there). What does not
        apply is None.
    """
    from importlib import util

    from . import trtexec

    place = request["root"]
    while not os.path.isdir(place):
        place = os.path.dirname(place) or "."
    l4t = tegra_release(_read("/etc/nv_tegra_release"))
    return {
        "arch": platform.machine(),
        "cpu": cpu(),
        "vector_bits": vector_bits(_cpu_flags()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _memory(),
        "free_bytes": shutil.disk_usage(place).free,
        "os": "{} {}".format(platform.system(), platform.release()),
        "python": platform.python_version(),
        "runtimes": runtimes(),
        "gpus": gpus(),
        "driver": driver(_read("/proc/driver/nvidia/version")),
        "cuda": cuda(_read("/usr/local/cuda/version.json")),
        "l4t": l4t,
        "jetpack": jetpack(l4t) if l4t else None,
        "power_mode": power_mode(output_of("nvpmodel", "-q")),
        "container": os.environ.get("TOOLKIT_IMAGE"),
        "trtexec": trtexec.find(),
        "tensorrt_python": util.find_spec("tensorrt") is not None,
    }
