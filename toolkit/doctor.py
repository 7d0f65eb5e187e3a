"""What `toolkit doctor` looks at: this machine, and the device that a target names."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from toolkit import units
from toolkit.agent import facts
from toolkit.checks import Check
from toolkit.config import RuntimeName, Target
from toolkit.devices import Device
from toolkit.devices.probe import Probe, probe
from toolkit.engines.places import INSTALL, NAMES
from toolkit.errors import StageError

_BUILD_BYTES = 500e6, 5e9  # a run of the digits; one of CIFAR-10 with some garbage
_RELEASE_BYTES = 20e6, 1e9  # the smallest release, with the agent; two large ones with their evaluation data
_SKEW_SECONDS = 5.0
_HOT = 80.0  # °C; the modules throttle between 90 and 100
_OLDEST_PYTHON = (3, 8)


def examine_host(build: Path, target: Target | None = None) -> list[Check]:
    """Examine this machine: what every run needs, and what building for a target takes.

    Args:
        build: Folder of artifacts.
        target: The target; None for what every run needs.
    """
    from toolkit.containers import doctor as containers

    checks = [
        Check("python", "pass", platform.python_version()),
        _torch(),
        _space(
            "build folder", shutil.disk_usage(_existing(build)).free, build, _BUILD_BYTES, "toolkit gc --remove"
        ),
    ]
    if target is None or target.build.on is not None or target.where == "device":
        return checks
    if target.where == "container":
        return [*checks, *containers.examine(target)]
    version = facts.runtimes().get(target.runtime)
    where = "on this machine, which builds the engines"
    return [*checks, _runtime(target, version, where, INSTALL[target.runtime])]


def examine_device(device: Device, target: Target) -> tuple[Probe | None, list[Check]]:
    """Examine a device in one round trip.

    Returns:
        Its facts (None where it cannot be examined), and whether a target's releases can run there.
    """
    try:
        found = probe(device)
    except StageError as error:
        return None, [Check("reach", "fail", error.message, error.hint)]
    return found, judge(found, target, device.root)


def require(device: Device, target: Target) -> None:
    """Raise StageError, with every reason, when a target's releases cannot run on a device."""
    failures = [check for check in examine_device(device, target)[1] if check.status == "fail"]
    if failures:
        raise StageError("; ".join(check.text for check in failures), failures[0].hint)


def judge(found: Probe, target: Target, root: str) -> list[Check]:
    """Hold a device's facts against a target.

    Args:
        found: The facts.
        target: Whose releases are to run there.
        root: Where they live on it.
    """
    contained = target.runtime == "tensorrt" and (target.where == "container" or "tensorrt" not in found.runtimes)
    checks = [_system(found, target), *_gpu(found, target)]
    if contained:
        checks.append(_container(found, target))
    else:
        hint = _remedy(target, INSTALL[target.runtime])
        checks.append(_runtime(target, found.runtimes.get(target.runtime), "there", hint))
        checks += [_alternative(target, name, found.runtimes.get(name)) for name in target.alternatives]
        if target.runtime == "tensorrt" and not found.tensorrt_python:
            checks.append(_trtexec(found))
        checks.append(python(found))
        if checks[-1].status == "pass":
            checks.append(_numpy(found, target))
    checks += [
        _root(found, root),
        *_signatures(found, target),
        *_condition(found),
        *_tuning(found, target, contained),
        *_occupancy(found),
    ]
    return checks


def _torch() -> Check:
    try:
        return Check("torch", "pass", metadata.version("torch"))
    except metadata.PackageNotFoundError:
        return Check("torch", "fail", "PyTorch is not installed", "make install, or python3 -m pip install torch")


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _space(name: str, free: int, where: str | Path, limits: tuple[float, float], hint: str) -> Check:
    text = f"{units.size(free)} free for {where}"
    least, comfortable = limits
    if free < least:
        return Check(name, "fail", f"{text}, less than {units.size(least)}", hint)
    if free < comfortable:
        return Check(name, "warn", f"{text}, less than {units.size(comfortable)}", hint)
    return Check(name, "pass", text)


def _alternative(target: Target, runtime: RuntimeName, version: str | None) -> Check:
    """Say whether a runtime that a release may have is there; without it the target's own is not compared."""
    check = _runtime(target.using(runtime), version, "there", _remedy(target, INSTALL[runtime]))
    return replace(check, name="alternative", status="warn" if check.status == "fail" else check.status)


def _runtime(target: Target, version: str | None, where: str, hint: str) -> Check:
    name = NAMES[target.runtime]
    if version is None:
        return Check("runtime", "fail", f"{name} is not installed {where}", hint)
    return Check("runtime", "pass", f"{name} {version}")


def _remedy(target: Target, here: str) -> str:
    """Return how a target's device gets what it lacks: from here, or as on this machine."""
    if target.host in (None, "local"):
        return here
    return f"toolkit provision {target.name} --host {target.host}"


def _trtexec(found: Probe) -> Check:
    hint = "sudo apt-get install python3-libnvinfer there"
    if found.trtexec is None:
        hint += ", or libnvinfer-bin for trtexec"
        return Check("bindings", "fail", "it has neither TensorRT's Python bindings nor trtexec", hint)
    text = f"it has no Python bindings of TensorRT: {found.trtexec} measures latency, not accuracy"
    return Check("bindings", "warn", text, hint)


def _system(found: Probe, target: Target) -> Check:
    text = ", ".join([
        f"{found.distribution or found.os} on {found.arch}",
        f"{found.cores} cores",
        f"{units.size(found.memory_bytes)} of memory",
    ])  # fmt: skip
    if target.arch in ("any", found.arch):
        return Check("system", "pass", text)
    hint = f"name another host (--host), or another target than {target.name}"
    return Check("system", "fail", f"it is {found.arch}, and the target '{target.name}' is {target.arch}", hint)


def _gpu(found: Probe, target: Target) -> Iterator[Check]:
    names = ", ".join(f"{gpu['name']} ({gpu['compute_capability']})" for gpu in found.gpus)
    wanted = None if target.on_cpu else target.compute_capability
    if wanted in (None, *(gpu["compute_capability"] for gpu in found.gpus)):
        if names:
            yield Check("gpu", "pass", names)
    elif names:
        hint = f"name another host (--host), or another target than {target.name}"
        yield Check("gpu", "fail", f"it has {names}, and the target '{target.name}' needs {wanted}", hint)
    else:
        reason = f": nvidia-smi says {found.gpu_problem}" if found.gpu_problem else ""
        yield Check("gpu", "fail", f"it has no NVIDIA GPU that answers{reason}", "install NVIDIA's driver there")
    stack = {"L4T": found.l4t, "JetPack": found.jetpack, "driver": found.driver, "CUDA": found.cuda}
    if told := [f"{name} {version}" for name, version in stack.items() if version]:
        yield Check("nvidia", "pass", ", ".join(told))


def _container(found: Probe, target: Target) -> Check:
    missing = "" if target.where == "container" else "TensorRT is not installed, and "
    install = "install docker and nvidia-container-toolkit there" + ("" if not missing else ", or TensorRT")
    if found.container is None:
        return Check("container", "fail", f"{missing}there is no docker or podman", install)
    if found.container_problem is not None:
        hint = "sudo systemctl start docker there, or sudo usermod -aG docker $USER and log in again"
        return Check("container", "fail", f"{missing}docker does not answer: {found.container_problem}", hint)
    if not found.container_gpu:
        return Check("container", "fail", f"{missing}{found.container} has no GPU support", install)
    return Check("container", "pass", f"{found.container}, which can give the GPU to a container")


def python(found: Probe) -> Check:
    """Return whether the agent can run on a device's Python, NumPy and runtime aside."""
    oldest = "{}.{}".format(*_OLDEST_PYTHON)
    hint = f"install Python {oldest} or newer there; python in the target file names another than python3"
    if found.python is None:
        return Check("python", "fail", "Python does not run there", hint)
    if tuple(int(part) for part in re.findall(r"\d+", found.python)[:2]) < _OLDEST_PYTHON:
        return Check("python", "fail", f"Python {found.python} is too old", hint)
    return Check("python", "pass", found.python)


def _numpy(found: Probe, target: Target) -> Check:
    if found.numpy is not None:
        return Check("numpy", "pass", found.numpy)
    hint = _remedy(target, "sudo apt-get install python3-numpy, or python3 -m pip install numpy")
    return Check("numpy", "fail", f"the Python there ({found.python}) has no NumPy", hint)


def _root(found: Probe, root: str) -> Check:
    if not found.writable:
        hint = "name a folder of yours in the target file (root: PATH)"
        return Check("root", "fail", f"releases go to {root}, and {found.place} cannot be written to", hint)
    if found.free_bytes is None:
        return Check("root", "warn", f"the free space of {found.place} is not known")
    return _space("root", found.free_bytes, root, _RELEASE_BYTES, "free space there, or name another root")


def _signatures(found: Probe, target: Target) -> Iterator[Check]:
    if found.guarded:
        yield Check("signatures", "pass", "it takes only releases that are signed")
    elif target.signing == "required":
        text = f"'{target.name}' says signing: required, and it takes releases of anybody"
        yield Check("signatures", "fail", text, f"toolkit trust {target.name}")


def _condition(found: Probe) -> Iterator[Check]:
    """Yield what makes a measurement unsteady, or a time stamp wrong."""
    if found.skew is not None and abs(found.skew) > _SKEW_SECONDS:
        text = f"its clock is {units.duration(abs(found.skew))} {'ahead' if found.skew > 0 else 'behind'}"
        yield Check("clock", "warn", text, "sudo timedatectl set-ntp true there")
    elif found.skew is not None:
        yield Check("clock", "pass", "agrees with this machine's")
    if found.load is not None:
        busy = found.load > found.cores / 2
        text = f"{found.load:g} on {found.cores} cores"
        hint = "measure when nothing else runs there" if busy else None
        yield Check("load", "warn" if busy else "pass", text, hint)
    if found.temperature is not None:
        hot = found.temperature >= _HOT
        hint = "let it cool down, or measurements are of a throttled device" if hot else None
        yield Check("temperature", "warn" if hot else "pass", f"{found.temperature:.0f} °C", hint)


def _tuning(found: Probe, target: Target, contained: bool) -> Iterator[Check]:
    """Yield whether power mode and clocks are, or may be set to, what the target asks for."""
    mode, clocks = target.power_mode, target.clocks
    if contained and (mode is not None or clocks is not None):
        text = "power mode and clocks cannot be set from inside the container that the release runs in"
        yield Check("tuning", "fail", text, "set them by hand, and leave them out in the target file")
        return
    if mode is not None and found.power_mode is None:
        yield Check("power mode", "fail", "it has no power modes", "leave out power_mode in the target file")
    elif mode not in (None, found.power_mode):
        yield _settable("power mode", f"{found.power_mode}, {mode} is asked for", found.power_set, target)
    elif found.power_mode is not None:
        yield Check("power mode", "pass", found.power_mode)
    if clocks is not None and found.clocks is None:
        yield Check("clocks", "fail", "it has none that can be locked", "leave out clocks in the target file")
    elif clocks is not None:
        yield _settable("clocks", f"to be {clocks}", found.clocks, target)
    elif found.clocks == "no":
        text = "this user may not lock them, and timings at floating clocks are unsteady"
        yield Check("clocks", "warn", text, "lock them as root before a run, or let this user: docs/devices.md")
    elif found.clocks is not None:
        yield Check("clocks", "pass", "may be locked (clocks: locked in the target file)")


def _settable(name: str, text: str, who: str | None, target: Target) -> Check:
    """Return whether what only root may set can be set there for a target."""
    if who == "root" or (who == "sudo" and target.sudo):
        return Check(name, "pass", text)
    if who == "sudo":
        return Check(name, "fail", f"{text}, and may be set with sudo only", "sudo: true in the target file")
    hint = "give it the right that docs/devices.md shows, and sudo: true in the target file"
    return Check(name, "fail", f"{text}, and this user may not set it", hint)


def _occupancy(found: Probe) -> Iterator[Check]:
    yield Check("release", "pass", f"{found.current} is current" if found.current else "none yet")
    if found.holder:
        yield Check("lease", "warn", f"at work there: {found.holder}", "wait until they have ended: --wait 10m")
    elif found.locked:
        holder = f"process {found.lock_holder}" if found.lock_holder else "another process"
        yield Check("lock", "warn", f"{holder} works on the releases there", "wait until it has ended")
