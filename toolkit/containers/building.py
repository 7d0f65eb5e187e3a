"""Builds and pulls images."""

from __future__ import annotations

import os
import re

from toolkit import process
from toolkit.containers import ContainerEngine, Run, Say, images, inspect
from toolkit.containers.images import Choice, Image
from toolkit.errors import StageError


def require_image(engine: ContainerEngine, choice: Choice, say: Say) -> None:
    """Build or pull an image where it is not there yet.

    Args:
        engine: The engine that needs it.
        choice: See :func:`toolkit.containers.images.image_for`.
        say: Told of the progress, a line at a time.

    Raises:
        StageError: It can be neither built nor pulled.
    """
    if inspect(engine, choice.image) is not None:
        return
    if choice.build is not None:
        build_image(engine, choice.build, say)
        return
    say(f"pulling {choice.image}")
    returncode, lines = _stream(engine.run, [engine.command, "pull", choice.image], say)
    if returncode != 0:
        raise StageError(
            f"the image {choice.image} is not there and cannot be pulled: {_reason(lines)}",
            f"check its name and the network; for a private registry: {engine.command} login REGISTRY",
        )


def build_image(engine: ContainerEngine, name: str, say: Say, platform: str | None = None) -> Image:
    """Build one image of the bake file; on another machine, one that copies nothing from the sources.

    Args:
        engine: The engine that builds and keeps it.
        name: Of the bake file's target.
        say: Told of the progress, a line at a time.
        platform: As ``linux/arm64``; the engine's own by default.

    Raises:
        StageError: The base cannot be pulled, or a step fails.
    """
    image = images.catalogue(_revision())[name]
    dockerfile = image.dockerfile.read_text(encoding="utf-8")
    copies = "\nCOPY " in dockerfile
    if copies and not (engine.here and (image.context / "pyproject.toml").is_file()):
        raise StageError(
            f"the image '{name}' is built from the toolkit's sources",
            f"in a checkout on that machine: toolkit containers build {name}",
        )
    command = [engine.command, "build", "--tag", image.tag, "--network", image.network]
    # podman's own image format has no health check
    command += ["--progress", "plain"] if engine.kind == "docker" else ["--format", "docker"]
    for key, value in image.arguments.items():
        command += ["--build-arg", f"{key}={value}"]
    for key, value in image.labels.items():
        command += ["--label", f"{key}={value}"]
    if image.stage:
        command += ["--target", image.stage]
    if platform:
        command += ["--platform", platform]
    if engine.here and (settings := os.environ.get("PIP_CONFIG_FILE")):
        command += ["--secret", f"id=pip,src={settings}"]
    command += ["--file", str(image.dockerfile), str(image.context)] if copies else ["-"]
    say(f"building {image.tag} on {image.base}")
    stdin = "" if copies else dockerfile
    returncode, lines = _stream(engine.run, ["env", "DOCKER_BUILDKIT=1", *command], say, stdin)
    if returncode == 0:
        return image
    text = "\n".join(lines)
    if "buildx component is missing" in text:
        raise StageError(
            f"{engine.command} builds no image without buildx",
            "install it (Debian, Ubuntu: sudo apt-get install docker-buildx), or use podman",
        )
    if re.search(r"load metadata for \S+:$|pull access|initializing source", text, re.MULTILINE):
        raise StageError(
            f"the image '{name}' could not be built: its base {image.base} cannot be pulled",
            f"check the network and its name; for a private registry: {engine.command} login REGISTRY",
        )
    raise StageError(
        f"the image '{name}' could not be built: {_reason(lines)}", "its step and its whole output stand above"
    )


def _stream(run: Run, argv: list[str], say: Say, stdin: str = "") -> tuple[int, list[str]]:
    """Run a command, say every line of its stdout and stderr, and return its exit status and the lines."""
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(line)
        say(line)

    finished = run(["sh", "-c", 'exec "$@" 2>&1', "sh", *argv], stdin=stdin, on_line=hear)
    return finished.returncode, lines


def _reason(lines: list[str]) -> str:
    wrong = [line for line in lines if re.search(r"error|denied|not found|failed", line, re.IGNORECASE)]
    return (wrong or lines or ["it said nothing"])[-1].strip()


def _revision() -> str:
    """Return the commit of the sources, or ``unknown`` where there is no git checkout."""
    lines: list[str] = []
    command = [
        "git",
        "-C",
        str(images.folder().parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        finished = process.run(command, on_line=lines.append)
    except StageError:
        return "unknown"
    return lines[0] if finished.returncode == 0 else "unknown"
