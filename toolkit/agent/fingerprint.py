"""What an engine depends on, and whether a device is that."""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

from . import facts, trt
from .releases import digest

CPU = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}  # what computes on the CPU, as people spell it


def of_cpu(runtime: str) -> dict[str, Any]:
    """Return what an engine that computes on the CPU depends on."""
    return {
        "runtime": runtime,
        "version": facts.runtimes().get(runtime),
        "arch": platform.machine(),
        "cpu": facts.cpu(),
    }


def of(request: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """Return what an engine of TensorRT depends on, and what else was so when it was built.

    Args:
        request: The build request.
        here: The facts of where it is built.
    """
    options = request["options"]
    ahead = options.get("compute_capabilities")
    gpu = here["gpus"][0] if here["gpus"] and not ahead else None
    built = {key: request[key] for key in ("precision", "input", "batches", "options")}
    return {
        "runtime": request["runtime"],
        "version": here["runtimes"].get(request["runtime"]),
        "gpu": gpu["name"] if gpu else None,
        "compute_capability": ahead or ([gpu["compute_capability"]] if gpu else []),
        "hardware_compatibility": options.get("hardware_compatibility") or "none",
        "l4t": None if ahead else here["l4t"],
        "jetpack": None if ahead else here["jetpack"],
        "cuda": here["cuda"],
        "driver": here["driver"],
        "power_mode": here["power_mode"],
        "container": here["container"],
        "onnx_sha256": digest(request["onnx"]),
        "options_sha256": hashlib.sha256(json.dumps(built, sort_keys=True).encode()).hexdigest(),
    }


def mismatch(built: dict[str, Any], here: dict[str, Any]) -> str | None:
    """Return why an engine does not fit a device, or None when it does.

    A plan is bound to the exact version of TensorRT, to the GPU's compute capability, without hardware
    compatibility to the GPU's model, and on a Jetson to the L4T release (TensorRT's support policies;
    dusty-nv/jetson-containers issue 19).

    Args:
        built: The engine's fingerprint.
        here: The device's facts.
    """
    if built["runtime"] in CPU:
        return _cpu_mismatch(built, here)
    name = trt.name(built["runtime"])
    version = here["runtimes"].get(built["runtime"])
    if version is None or not same(version, built["version"]):
        return "built with {} {}, the device has {}".format(name, built["version"], version or "none")
    if not here["gpus"]:
        return "built for {}, the device has no NVIDIA GPU".format(", ".join(built["compute_capability"]))
    gpu = here["gpus"][0]
    capability = gpu["compute_capability"]
    newer = built["hardware_compatibility"] == "ampere+" and int(capability[3:]) >= 80
    if capability not in built["compute_capability"] and not newer:
        return "built for {}, the device has {}".format(", ".join(built["compute_capability"]), capability)
    if built["gpu"] not in (None, gpu["name"]) and built["hardware_compatibility"] == "none":
        return "built on {}, the device has {}".format(built["gpu"], gpu["name"])
    if built["l4t"] not in (None, here["l4t"]):
        return "built with L4T {}, the device has {}".format(built["l4t"], here["l4t"])
    return None


def _cpu_mismatch(built: dict[str, Any], here: dict[str, Any]) -> str | None:
    version = here["runtimes"].get(built["runtime"])
    if built["version"] != version:
        name = CPU[built["runtime"]]
        return "built with {} {}, the device has {}".format(name, built["version"], version or "none")
    for key in ("arch", "cpu"):
        if built[key] != here[key]:
            return "built for {}, the device has {}".format(built[key], here[key])
    return None


def same(one: str, other: str) -> bool:
    """Compare two versions as far as both go: not every installation knows its build number."""
    return all(a == b for a, b in zip(one.split("."), other.split(".")))
