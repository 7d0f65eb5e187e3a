"""The one door to docker and podman: finds the engine, composes its commands, explains what it refuses."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from toolkit import process
from toolkit.errors import StageError
from toolkit.process import Finished

if TYPE_CHECKING:
    from toolkit.devices import Device

Run = Callable[..., Finished]
"""``process.run`` for this machine, or a device's ``run`` for another."""
Say = Callable[[str], None]

# how docker and podman call what uname calls otherwise
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

_PROBE = """
echo "user=$(id -u):$(id -g)"
cat /etc/cdi/* /var/run/cdi/* 2> /dev/null | grep -q nvidia.com/gpu && echo cdi=yes
command -v nvidia-container-runtime-hook > /dev/null && echo hook=yes
test -e /etc/nv_tegra_release && echo jetson=yes
exit 0
"""


# an image that does not set these two gets no libcuda from the runtime
JETSON_GPU = (
    "--runtime", "nvidia", "--env", "NVIDIA_VISIBLE_DEVICES=all", "--env", "NVIDIA_DRIVER_CAPABILITIES=all",
)  # fmt: skip


@dataclass(frozen=True)
class ContainerEngine:
    """A container engine that answers, and what it can do.

    Attributes:
        command: What is typed: ``docker``, ``podman`` or a path.
        kind: What it is, whatever it is called.
        platform: Of the machine that its containers run on, as ``linux/amd64``.
        user: ``uid:gid`` of who calls it.
        rootless: Whether it runs without root's rights, so that root in a container is the user outside.
        selinux: Whether mounts have to be freed from SELinux' labels.
        gpu: Its options for GPUs; None where it can give none.
        storage: Folder of its images.
        here: Whether it stands on this machine.
        run: Runs a program where it stands.
    """

    command: str
    kind: Literal["docker", "podman"]
    platform: str
    user: str
    rootless: bool
    selinux: bool
    gpu: tuple[str, ...] | None
    storage: str
    here: bool = True
    run: Run = field(default=process.run, repr=False)


def find_engine(device: Device | None = None) -> ContainerEngine:
    """Return the container engine that answers: docker, or podman.

    ``TOOLKIT_CONTAINER_ENGINE`` names another command; ``DOCKER_HOST`` is docker's own business.

    Args:
        device: The machine to look on; this one by default.

    Raises:
        StageError: None is installed, none answers, or this user may not use it.
    """
    from toolkit.devices.local import LocalDevice

    here = device is None or isinstance(device, LocalDevice)
    run = process.run if device is None else device.run
    override = os.environ.get("TOOLKIT_CONTAINER_ENGINE")
    failure: StageError | None = None
    for command in [override] if override else ["docker", "podman"]:
        if run(["sh", "-c", 'command -v "$0"', command]).returncode != 0:
            continue
        try:
            return _ask(command, run, here)
        except StageError as error:
            failure = failure or error
    raise failure or StageError(
        f"there is no {override or 'docker or podman'}",
        "install one (Debian, Ubuntu: sudo apt-get install docker.io docker-buildx, or podman)",
    )


def _ask(command: str, run: Run, here: bool) -> ContainerEngine:
    lines: list[str] = []
    finished = run([command, "info", "--format", "{{json .}}"], on_line=lines.append, timeout=60)
    try:
        info = json.loads("".join(lines))
    except ValueError:
        info = {}
    problems = [*(info.get("ServerErrors") or ()), *finished.stderr.strip().splitlines()]
    if finished.returncode != 0 or info.get("ServerErrors") or not info:
        reason = problems[0] if problems else f"exit {finished.returncode}"
        if "permission denied" in reason.lower():
            raise StageError(
                f"this user may not use {command}: {reason}",
                "sudo usermod -aG docker $USER, then log in again; or use podman, which needs no group",
            )
        raise StageError(
            f"{command} does not answer: {reason}", "sudo systemctl start docker, or check DOCKER_HOST"
        )
    seen: list[str] = []
    run(["sh", "-c", _PROBE], on_line=seen.append)
    probe = dict(line.split("=", 1) for line in seen if "=" in line)
    kind: Literal["docker", "podman"]
    if "host" in info:
        kind, machine, storage = "podman", info["host"]["arch"], info["store"]["graphRoot"]
        rootless, selinux = (info["host"]["security"].get(key, False) for key in ("rootless", "selinuxEnabled"))
    else:
        kind, machine, storage = "docker", info["Architecture"], info["DockerRootDir"]
        rootless, selinux = (
            f"name={key}" in (info.get("SecurityOptions") or ()) for key in ("rootless", "selinux")
        )
    return ContainerEngine(
        command=command,
        kind=kind,
        platform=f"linux/{_ARCHITECTURES.get(machine, machine)}",
        user=probe["user"],
        rootless=rootless,
        selinux=selinux,
        gpu=_gpu_options(kind, info, probe),
        storage=storage,
        here=here,
        run=run,
    )


def _gpu_options(kind: str, info: dict[str, Any], probe: dict[str, str]) -> tuple[str, ...] | None:
    cdi = ("--device", "nvidia.com/gpu=all")
    if kind == "podman":
        return cdi if "cdi" in probe else None
    registered = "nvidia" in (info.get("Runtimes") or {})
    if registered and "jetson" in probe:
        return JETSON_GPU
    if registered or "hook" in probe:
        return ("--gpus", "all")
    return cdi if "cdi" in probe and info.get("CDISpecDirs") else None


def unique_name() -> str:
    """Return a name for a container, by which it can be removed whatever happens."""
    return f"toolkit-{secrets.token_hex(6)}"


def run_command(
    engine: ContainerEngine,
    image: str,
    argv: Sequence[str],
    *,
    mounts: Sequence[str],
    gpu: bool,
    name: str,
    home: str,
    env: Mapping[str, str] | None = None,
    network: str = "none",
    workdir: str | None = None,
    shared_memory: str | None = None,
) -> list[str]:
    """Compose the command that runs a program in a container, as the user who calls.

    Args:
        engine: See :func:`find_engine`.
        image: Name and tag.
        argv: Program and arguments; the image's entry point is left out, since some write to stdout.
        mounts: Folders and files, which are at the same path inside.
        gpu: Whether it needs the GPUs.
        name: Of the container; see :func:`unique_name`.
        home: Its HOME; below one of the mounts, so that caches last.
        env: Environment variables.
        network: ``none``, or an engine's network: ``default``, ``host``.
        workdir: Its working folder.
        shared_memory: Size of its /dev/shm, as ``1g``; the engine's own is 64 MB.

    Raises:
        StageError: A GPU is needed, and the engine can give none.
    """
    command = [engine.command, "run", "--rm", "--interactive", "--init", "--name", name, "--network", network]
    if engine.kind == "podman" and engine.rootless:
        command += ["--userns", "keep-id"]
    # in a rootless docker, root is the user who calls
    command += ["--user", "0:0" if engine.kind == "docker" and engine.rootless else engine.user]
    if engine.selinux:
        command += ["--security-opt", "label=disable"]
    if gpu:
        command += require_gpu(engine)
    for path in mounts:
        command += ["--mount", _mount(path)]
    if shared_memory:
        command += ["--shm-size", shared_memory]
    if workdir:
        command += ["--workdir", workdir]
    # libraries ask for the user's name, which is not in the image's passwd
    for key, value in {"HOME": home, "USER": "toolkit", **(env or {})}.items():
        command += ["--env", f"{key}={value}"]
    return [*command, "--entrypoint", argv[0], image, *argv[1:]]


def require_gpu(engine: ContainerEngine) -> tuple[str, ...]:
    """Return the engine's options for GPUs; raises StageError where it can give none."""
    if engine.gpu is not None:
        return engine.gpu
    if engine.kind == "podman":
        hint = "install nvidia-container-toolkit, then: sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
    else:
        hint = (
            "install nvidia-container-toolkit, then: sudo nvidia-ctk runtime configure --runtime=docker && "
            "sudo systemctl restart docker"
        )
    raise StageError(f"{engine.command} has no GPU support", hint)


def _mount(path: str) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(["type=bind", f"source={path}", f"target={path}"])
    return line.getvalue()


def remove(engine: ContainerEngine, name: str) -> None:
    """Remove a container, running or not; one that is gone is fine."""
    engine.run([engine.command, "rm", "--force", name], timeout=60)


def refused(engine: ContainerEngine, image: str, returncode: int, stderr: str) -> StageError | None:
    """Return the sentence for a container that did not come to run its program; None when it did.

    Args:
        engine: The engine that was asked.
        image: The image that was to run.
        returncode: What ``docker run`` exited with.
        stderr: What it wrote.
    """
    # docker's client gives up waiting at once and sometimes says that too, after the reason
    asides = ("--help", "error waiting for container: context canceled")
    lines = [line for line in stderr.strip().splitlines() if not any(aside in line for aside in asides)]
    reason = lines[-1].removeprefix("docker: ").strip() if lines else f"exit {returncode}"
    if returncode and re.search(r"exec format error", stderr, re.IGNORECASE):
        return StageError(
            f"the image {image} is for another architecture than {engine.platform}",
            "name an image for this one, or install qemu-user-static and binfmt-support to emulate it",
        )
    if returncode not in (125, 126, 127) and "failed to exec pid1" not in stderr:  # podman's init exits with 1
        return None
    if re.search(r"no space left on device", stderr, re.IGNORECASE):
        return StageError(f"{engine.command} has no disk space left: {reason}", f"{engine.command} system prune")
    if re.search(r"could not select device driver|nvidia-container-cli|unresolvable CDI|unknown .*runtime", stderr):
        return StageError(
            f"{engine.command} cannot give the GPU to a container: {reason}",
            "check nvidia-smi on that machine and its nvidia-container-toolkit (toolkit containers doctor)",
        )
    if re.search(r"container-init binary|docker-init", stderr):
        package = "catatonit" if engine.kind == "podman" else "tini"
        return StageError(
            f"{engine.command} has no init for containers: {reason}",
            f"install it (Debian, Ubuntu: sudo apt-get install {package})",
        )
    if returncode == 127 or re.search(r"not found|no such file", reason, re.IGNORECASE):
        return StageError(
            f"the image {image} cannot run the program: {reason}", "name an image that has python3 in its PATH"
        )
    return StageError(f"{engine.command} could not run {image}: {reason}", "toolkit containers doctor looks closer")


def inspect(engine: ContainerEngine, image: str) -> dict[str, Any] | None:
    """Return what the engine knows of an image that it has; None when it does not have it."""
    lines: list[str] = []
    finished = engine.run([engine.command, "image", "inspect", image], on_line=lines.append)
    return dict(json.loads("".join(lines))[0]) if finished.returncode == 0 else None
