"""A device without the runtime gets it: wheels chosen here, a virtual environment made of them there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import doctor, units
from toolkit.agent import facts
from toolkit.config import Target
from toolkit.delivery import wheels
from toolkit.devices import Device
from toolkit.devices.agent import Agent
from toolkit.devices.probe import Probe, probe
from toolkit.errors import StageError
from toolkit.store import Progress, sha256_file

_ON_CPU = {"onnxruntime": "", "openvino": ">=2025.0"}
_MODULES = {
    "cuda-python": "cuda",
    "numpy": "numpy",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "pillow": "PIL",
    "tensorrt-rtx-cu13": "tensorrt_rtx",
}


@dataclass(frozen=True)
class Order:
    """What a device's environment is to be made of.

    Attributes:
        python: Python there that it is made from.
        wheels: Every wheel by its file name.
        request: What the agent is asked for, without where.
    """

    python: str
    wheels: dict[str, Path]
    request: dict[str, Any]

    @property
    def packages(self) -> list[str]:
        """Name and version of all that will be in it."""
        return [" ".join(name.split("-")[:2]) for name in self.wheels if not name.startswith("pip-")]


def choose(device: Device, target: Target, cache: Path, source: Path | None = None) -> Order:
    """Find the wheels that a target's releases need on a device, beside what was provisioned there before.

    Args:
        device: Which is looked at, and nothing changed there.
        target: Its runtime decides what, its ``python`` for which Python.
        cache: Folder where wheels are kept.
        source: Folder to take the wheels from, instead of pip's index.

    Raises:
        UsageError: ``source`` is no folder.
        StageError: The device has no suitable Python, or a wheel cannot be had.
    """
    found = probe(device, target.python)
    check = doctor.python(found)
    if check.status == "fail":
        raise StageError(f"{device.name}: {check.text}", check.hint)
    before = found.provisioned or {}
    requirements = before.get("requirements", {}) | needs(target, found, device.name)
    system = target.runtime == "tensorrt" or before.get("system", False)
    modules = [_MODULES[name] for name in sorted(requirements)]
    chosen = {path.name: path for path in wheels.gather(requirements, found, cache, source)}
    request = {
        "wheels": {name: sha256_file(path) for name, path in chosen.items()},
        "requirements": requirements,
        "modules": [*modules, "tensorrt"] if system and found.tensorrt_python else modules,
        "system": system,
    }
    return Order(target.python, chosen, request)


def provision(device: Device, order: Order, progress: Progress = lambda done, total, text: None) -> bool:
    """Give a device its environment; returns whether anything had to be done.

    Raises:
        StageError: The device has no room, or a wheel does not work there; what was there before is still in use.
    """
    agent = Agent(device, order.python)
    request = order.request | {"root": device.root}
    done = agent.ask("provision", request, progress=progress)
    missing = [order.wheels[name] for name in done["missing"]]
    if not missing:
        return bool(done["changed"])
    total = sum(path.stat().st_size for path in missing)
    needed = total + sum(wheels.installed_bytes(path) for path in order.wheels.values())
    if needed > done["free_bytes"]:
        raise StageError(
            f"{device.name} has {units.size(done['free_bytes'])} free below {device.root}, and the runtime "
            f"needs {units.size(needed)}",
            "free space there, or name another root in the target file",
        )
    sent = 0

    def count(block: int) -> None:
        nonlocal sent
        sent += block
        progress(sent, total, "bytes sent")

    for path in missing:
        device.upload(path, f"{device.root}/wheels/{path.name}", 0, count)
    if damaged := agent.ask("provision", request, progress=progress)["missing"]:
        raise StageError(f"{', '.join(damaged)} arrived damaged on {device.name}", "run the same command again")
    return True


def needs(target: Target, found: Probe, where: str) -> dict[str, str]:
    """Return the packages that a target's releases need on a device, with their versions as pip writes them.

    Args:
        target: Its runtimes decide.
        found: The device.
        where: Its name, for messages.

    Raises:
        StageError: Its releases run in a container there.
    """
    wanted = {"numpy": "", "pillow": ""}
    if target.on_cpu:
        return wanted | {name: _ON_CPU[name] for name in (target.runtime, *target.alternatives)}
    if target.runtime == "tensorrt-rtx":  # an engine runs on the version that built it, which is this machine's
        version = facts.runtimes().get("tensorrt-rtx")
        return wanted | {"tensorrt-rtx-cu13": f"=={version}" if version else "", "cuda-python": "==13.*"}
    if target.where == "container" or "tensorrt" not in found.runtimes:
        raise StageError(
            f"there is nothing to provision on {where}: releases of '{target.name}' run in a container there, "
            "which brings what they need",
            "to do without it, install TensorRT there (on a Jetson: sudo apt-get install python3-libnvinfer)"
            + (", and set build: {where: device}" if target.where == "container" else ""),
        )
    if found.numpy is not None:  # TensorRT's bindings were made for this one
        del wanted["numpy"]
    return wanted | {"cuda-python": f"=={_cuda(found)}.*"}


def _cuda(found: Probe) -> int:
    """Return the major version of CUDA; where only the driver is known, 13 came with driver 580."""
    version = found.cuda or ("13" if int((found.driver or "0").split(".")[0]) >= 580 else "12")
    return int(version.split(".")[0])
