"""Where an engine is built: on this machine, in a container, on the device, or ahead of time without a GPU."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from toolkit.config import Target
from toolkit.devices import Device, open_device
from toolkit.devices.agent import Agent
from toolkit.devices.local import LocalDevice
from toolkit.errors import StageError

if TYPE_CHECKING:
    from toolkit.containers.images import Choice
    from toolkit.devices.container import ContainerDevice

NAMES = {
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
INSTALL = {
    "onnxruntime": "python3 -m pip install onnxruntime",
    "openvino": "python3 -m pip install openvino",
    "tensorrt": "install it, or build in a container (build: {where: container} in the target file)",
    "tensorrt-rtx": "python3 -m pip install tensorrt-rtx-cu13",
}
_WHY = {
    "ahead-of-time": "{runtime} needs no GPU to build",
    "container": "the image fixes the version of {runtime}",
    "device": "an engine of {runtime} is bound to the machine that it is built on",
    "host": "the target says so",
}
# L4T, JetPack and TensorRT of the releases that a Jetson may have: NVIDIA's JetPack archive
_JETPACKS = {
    "sm_87": (("35.2.1", "5.1", "8.5.2.2"), ("36.4.3", "6.2", "10.3.0.30"), ("39.2", "7.2", "10.16.2.10")),
    "sm_110": (("38.2", "7.0", "10.13.3.9"), ("39.2", "7.2", "10.16.2.10")),
}


@dataclass(frozen=True)
class Place:
    """A machine, or a container on one, that the agent builds on.

    Attributes:
        device: Where the agent runs.
        why: Why there.
        image: What the container is made of, where it is one.
    """

    device: Device
    why: str
    image: Choice | None = None

    @property
    def ready(self) -> bool:
        """Whether nothing has to be pulled or built first."""
        from toolkit import containers

        return self.image is None or containers.inspect(self._container.engine, self.image.image) is not None

    def prepare(self, say: Callable[[str], None]) -> None:
        """Pull or build the image where it is missing; raises StageError when that fails."""
        if self.image is not None:
            from toolkit.containers.building import require_image

            require_image(self._container.engine, self.image, say)

    @property
    def _container(self) -> ContainerDevice:
        from toolkit.devices.container import ContainerDevice

        assert isinstance(self.device, ContainerDevice)
        return self.device

    @property
    def command(self) -> str:
        """What runs there."""
        argv = [self.device.python, Agent(self.device).place, "build"]
        return _join(argv if self.image is None else self._container.command(argv, "toolkit-build"))


def choose(target: Target, build: Path) -> Place:
    """Return where a target's engine is built.

    Args:
        target: Its ``build.where`` and ``build.on`` decide.
        build: Folder of artifacts; this machine builds below it.

    Raises:
        StageError: Nothing can be built there, with the reason.
    """
    why = _WHY[target.where].format(runtime=NAMES[target.runtime])
    if target.where == "device":
        return _on_device(target, open_device(target.host, target, build), why)
    machine = open_device(target.build.on, target, build, root=build / "builder")
    if target.runtime == "tensorrt":
        require_gpu(target, machine, f"a TensorRT engine for {target.compute_capability} is built on such a GPU")
    if target.where == "container":
        return _contained(target, machine, why)
    _require_runtime(target, machine)
    return Place(machine, why)


def _on_device(target: Target, device: Device, why: str) -> Place:
    if not target.on_cpu:
        require_gpu(target, device, f"a {NAMES[target.runtime]} engine for {target.name} is built on the device")
    return native_or_contained(target, device, why)


def native_or_contained(target: Target, device: Device, why: str) -> Place:
    """Return how a device builds and runs a target's engines: natively, or in the image that fits it.

    Raises:
        StageError: No image fits, or there is no container engine.
    """
    if target.runtime != "tensorrt":
        _require_runtime(target, device)
        return Place(device, why)
    if target.where == "container":
        return _contained(target, device, why)
    if "tensorrt" not in device.facts()["runtimes"]:
        return _contained(target, device, f"{why}, and TensorRT is not installed on it")
    return Place(device, why)


def _contained(target: Target, machine: Device, why: str) -> Place:
    from toolkit import containers
    from toolkit.containers import images
    from toolkit.devices.container import ContainerDevice

    choice = images.image_for(target, machine.facts())
    engine = containers.find_engine(machine)
    device = ContainerDevice(machine, engine, choice.image, gpu=target.runtime == "tensorrt")
    return Place(device, f"{why} ({choice.why})", choice)


def _require_runtime(target: Target, machine: Device) -> None:
    """Raise StageError when this machine lacks a target's runtime; another one goes through the doctor."""
    if isinstance(machine, LocalDevice) and target.runtime not in machine.facts()["runtimes"]:
        raise StageError(f"{NAMES[target.runtime]} is not installed on {machine.name}", INSTALL[target.runtime])


def require_gpu(target: Target, machine: Device, what: str) -> None:
    """Raise StageError when a machine has no GPU of a target's compute capability.

    Args:
        target: Names the compute capability.
        machine: Where it is needed.
        what: What it is needed for, the first half of the sentence.
    """
    capabilities = [gpu["compute_capability"] for gpu in machine.facts()["gpus"]]
    if target.compute_capability in capabilities:
        return
    has = f"has {', '.join(capabilities)}" if capabilities else "has no NVIDIA GPU"
    raise StageError(f"{what}, and {machine.name} {has}", _remedy(target))


def _remedy(target: Target) -> str:
    ways = [f"name {target.description or target.name} with --host, or run the same command on it"]
    if target.runtime == "tensorrt" and target.arch != "aarch64":
        ways.append("build without a GPU (--runtime tensorrt-rtx)")
    return ", or ".join(ways)


def explain(target: Target, build: Path) -> list[str]:
    """Return, for a plan, where a target's engine would be built, why, and the command that would run there."""
    try:
        place = choose(target, build)
    except StageError as problem:
        releases = _JETPACKS.get(str(target.compute_capability), ())
        if target.where != "device" or target.runtime != "tensorrt" or not releases:
            return [f"cannot be built: {problem.message}"]
        return [
            f"{problem.message}; what it would run depends on its JetPack:",
            *(line for release in releases for line in _on_jetpack(target, *release)),
        ]
    return [f"on {place.device.name}: {place.why}", place.command]


def _on_jetpack(target: Target, l4t: str, jetpack: str, tensorrt: str) -> list[str]:
    """Return what a Jetson runs as NVIDIA sets it up: natively, or in a container where TensorRT is missing."""
    from toolkit.containers import JETSON_GPU, ContainerEngine, images
    from toolkit.devices.container import ContainerDevice

    jetson = cast(
        Device, SimpleNamespace(name="the device", python="python3", root=target.root or "$HOME/.toolkit")
    )
    docker = ContainerEngine("docker", "docker", "linux/arm64", "$(id -u):$(id -g)", False, False, JETSON_GPU, "")
    choice = images.image_for(target, {"arch": "aarch64", "l4t": l4t})
    contained = Place(ContainerDevice(jetson, docker, choice.image, gpu=True), "", choice)
    return [
        f"JetPack {jetpack} (L4T {l4t}) with its TensorRT {tensorrt}:  {Place(jetson, '').command}",
        f"JetPack {jetpack} (L4T {l4t}) without, in an image on {choice.base}:  {contained.command}",
    ]


def _join(argv: Sequence[str]) -> str:
    """Quote a command for a shell, which still is to fill in what belongs to the user there."""
    return " ".join(f'"{word}"' if "$" in word else shlex.quote(word) for word in argv)
