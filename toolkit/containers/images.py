"""Container images: what ``docker-bake.hcl`` can build, and which one fits a device by ``images.yaml``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toolkit import __version__, files
from toolkit.config import Target
from toolkit.errors import StageError

CERTAINTY = {
    "confirmed": "confirmed by NVIDIA",
    "secondary": "reported by others, not by NVIDIA",
    "unconfirmed": "unconfirmed: verify it",
}


@dataclass(frozen=True)
class Image:
    """A target of the bake file.

    Attributes:
        name: The target's name.
        tag: The image's name and tag.
        base: The image that it stands on.
        dockerfile: Path of its Dockerfile.
        context: Folder that the Dockerfile copies from.
        stage: Stage of the Dockerfile, where it has several.
        arguments: Build arguments.
        labels: OCI labels.
        platforms: As ``linux/arm64``.
        network: Network of the build: ``default``, ``none`` or ``host``.
    """

    name: str
    tag: str
    base: str
    dockerfile: Path
    context: Path
    stage: str | None
    arguments: dict[str, str]
    labels: dict[str, str]
    platforms: list[str]
    network: str


@dataclass(frozen=True)
class Choice:
    """The image for a device.

    Attributes:
        image: Name and tag.
        why: The reason, for a person.
        build: The bake target that makes it; None for an image that is only pulled.
        base: What that stands on.
        tensorrt: Version of its TensorRT, as far as it is known.
        sure: ``confirmed``, ``secondary`` or ``unconfirmed``; None where no NVIDIA image is involved.
    """

    image: str
    why: str
    build: str | None = None
    base: str | None = None
    tensorrt: str | None = None
    sure: str | None = None


def folder() -> Path:
    """Return the folder of ``docker-bake.hcl`` and ``images.yaml``: the working folder's, or the shipped one."""
    return next(path for path in files.folders("containers") if (path / "docker-bake.hcl").is_file())


def catalogue(revision: str = "unknown") -> dict[str, Image]:
    """Read the bake file.

    Its variables come from the environment, as with ``docker buildx bake``.

    Args:
        revision: Commit of the sources, for the labels.

    Returns:
        Every image by name.
    """
    import hcl2

    place = folder()
    with (place / "docker-bake.hcl").open(encoding="utf-8") as file:
        content = hcl2.load(file)
    variables: dict[str, str] = {}
    for name, block in _blocks(content, "variable"):
        variables[name] = os.environ.get(name, _value(block["default"], {}))
    variables |= {"TOOLKIT_VERSION": __version__, "TOOLKIT_REVISION": revision}
    targets = {name: _value(block, variables) for name, block in _blocks(content, "target")}
    images = {}
    for name, own in targets.items():
        if name.startswith("_"):
            continue
        target: dict[str, Any] = {}
        for parent in own.get("inherits", ()):
            target |= targets[parent]
        target |= own
        images[name] = Image(
            name=name,
            tag=target["tags"][0],
            base=target["args"]["BASE"],
            dockerfile=place.parent / target["context"] / target["dockerfile"],
            context=place.parent / target["context"],
            stage=target.get("target"),
            arguments=target["args"],
            labels=target["labels"],
            platforms=target["platforms"],
            network=target["network"],
        )
    return images


def _blocks(content: dict[str, Any], kind: str) -> list[tuple[str, dict[str, Any]]]:
    return [(_value(name, {}), block) for entry in content[kind] for name, block in entry.items()]


def _value(found: Any, variables: Mapping[str, str]) -> Any:
    """Evaluate what the bake file uses of HCL: strings with ``${NAME}``, names of variables, lists and objects."""
    if isinstance(found, dict):
        return {_value(key, {}): _value(value, variables) for key, value in found.items() if key != "__is_block__"}
    if isinstance(found, list):
        return [_value(value, variables) for value in found]
    if found.startswith('"'):
        return re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], found[1:-1])
    return variables.get(found, found)


def rules() -> list[dict[str, Any]]:
    """Return the content of ``images.yaml``; what its keys mean stands there."""
    return list(yaml.safe_load((folder() / "images.yaml").read_text(encoding="utf-8")))


def image_for(target: Target, facts: Mapping[str, Any]) -> Choice:
    """Choose the image for a device.

    Args:
        target: The target; its ``image`` comes before everything else.
        facts: What is known of the device: ``arch``, ``l4t``, ``gpus``. What is missing is unknown, and the
            target file's word is taken for it.

    Raises:
        StageError: No image fits, or the machine is not what the target names.
    """
    if target.image:
        return Choice(target.image, "the target file names it")
    arch = facts.get("arch") or (None if target.arch == "any" else target.arch)
    if target.arch not in ("any", arch):
        raise StageError(
            f"the target '{target.name}' is {target.arch}, and this machine is {arch}",
            "build on the device (build.where: device), or on another machine of its kind (build.on: HOST)",
        )
    l4t = facts.get("l4t")
    known = {"runtime": target.runtime, "arch": arch, "l4t": l4t, "compute_capability": _capability(target, facts)}
    for entry in rules():
        if all(_holds(wanted, known[key]) for key, wanted in entry.items() if key in known):
            why = " on ".join(
                filter(None, [target.runtime, f"L4T {l4t}" if "l4t" in entry else known["compute_capability"]])
            )
            image = catalogue()[entry["image"]]
            return Choice(image.tag, why, image.name, image.base, entry.get("tensorrt"), entry.get("sure"))
    if arch == "aarch64" and target.runtime == "tensorrt" and l4t is None:
        raise StageError(
            f"the image for '{target.name}' depends on the JetPack of the device, which is not known",
            f"ask the device: toolkit plan {target.name} --host HOST",
        )
    described = ", ".join(f"{key} {value}" for key, value in known.items() if value)
    raise StageError(
        f"no image is known for {described}",
        "name one in the target file (image: NAME:TAG), or build on the device without a container",
    )


def _capability(target: Target, facts: Mapping[str, Any]) -> str | None:
    """Return the compute capability to build for; raises StageError where the machine has no such GPU."""
    wanted = target.compute_capability
    found = [gpu["compute_capability"] for gpu in facts.get("gpus") or ()]
    needed = target.runtime == "tensorrt" and facts.get("gpus") is not None
    if needed and not (wanted in found or (wanted is None and found)):
        raise StageError(
            f"the target '{target.name}' needs a GPU with {wanted or 'CUDA'}, "
            f"and this machine has {', '.join(found) or 'none'}",
            "build on the device or on a machine with such a GPU (build.where: device, build.on: HOST)",
        )
    return wanted or (found[0] if found else None)


def _holds(wanted: str | list[str], found: str | None) -> bool:
    """Tell whether a condition holds; a list names alternatives, of L4T versions by how they begin."""
    alternatives = wanted if isinstance(wanted, list) else [wanted]
    return found is not None and any(found == one or f"{found}.".startswith(f"{one}.") for one in alternatives)
