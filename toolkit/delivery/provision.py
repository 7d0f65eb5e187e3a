"""A device without the runtime gets it: wheels chosen here, a virtual environment made of them there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolkit import doctor, units
from toolkit.agent import facts
from toolkit.config import Target
from toolkit.delivery import wheels
from toolkit.devices import Device
from toolkit.devices.agent import Agent
from toolkit.devices.probe import Probe, probe
from toolkit.errors import StageError
from toolkit.store import Progress, sha256_file

_MODULES = {
    "cuda-python": "cuda",
    "numpy": "numpy",
    "onnxruntime": "onnxruntime",
    "pillow": "PIL",
    "tensorrt-rtx-cu13": "tensorrt_rtx",
}


@dataclass(frozen=True)
class Provisioned:
    """What provisioning did.

    Attributes:
        changed: Whether an environment was made; False where it was there and works.
        packages: Name and version of all that is in it.
        sent_bytes: How much was sent.
    """

    changed: bool
    packages: list[str]
    sent_bytes: int


def provision(
    device: Device,
    target: Target,
    cache: Path,
    source: Path | None = None,
    progress: Progress = lambda done, total, text: None,
) -> Provisioned:
    """Give a device what a target's releases need, beside what was provisioned there before.

    Args:
        device: Where.
        target: Its runtime decides what, its ``python`` for which Python.
        cache: Folder where wheels are kept.
        source: Folder to take the wheels from, instead of pip's index.
        progress: Told how far it is.

    Raises:
        UsageError: ``source`` is no folder.
        StageError: The device has no suitable Python or no room, a wheel cannot be had, or does not work there;
            what was there before is still in use.
    """
    found = probe(device, target.python)
    check = doctor.python(found)
    if check.status == "fail":
        raise StageError(f"{device.name}: {check.text}", check.hint)
    before = found.provisioned or {}
    requirements = before.get("requirements", {}) | needs(target, found, device.name)
    system = target.runtime == "tensorrt" or before.get("system", False)
    modules = [_MODULES[name] for name in sorted(requirements)]
    progress(0, 0, "looking for wheels")
    chosen = {path.name: path for path in wheels.gather(requirements, found, cache, source)}
    order = {
        "root": device.root,
        "wheels": {name: sha256_file(path) for name, path in chosen.items()},
        "requirements": requirements,
        "modules": [*modules, "tensorrt"] if system and found.tensorrt_python else modules,
        "system": system,
    }
    agent = Agent(device, target.python)
    done = agent.ask("provision", order, progress=progress)
    missing = [chosen[name] for name in done["missing"]]
    total = sum(path.stat().st_size for path in missing)
    if missing:
        needed = total + sum(wheels.installed_bytes(path) for path in chosen.values())
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
        done = agent.ask("provision", order, progress=progress)
        if done["missing"]:
            raise StageError(
                f"{', '.join(done['missing'])} arrived damaged on {device.name}", "run the same command again"
            )
    packages = [" ".join(name.split("-")[:2]) for name in chosen if not name.startswith("pip-")]
    return Provisioned(done["changed"], packages, total)


def needs(target: Target, found: Probe, where: str) -> dict[str, str]:
    """Return the packages that a target's releases need on a device, with their versions as pip writes them.

    Args:
        target: Its runtime decides.
        found: The device.
        where: Its name, for messages.

    Raises:
        StageError: Its releases run in a container there.
    """
    wanted = {"numpy": "", "pillow": ""}
    if target.runtime == "onnxruntime":
        return wanted | {"onnxruntime": ""}
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
