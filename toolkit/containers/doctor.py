"""What `toolkit containers doctor` looks at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import units
from toolkit.checks import Check
from toolkit.containers import ContainerEngine, find_engine, images, inspect, require_gpu
from toolkit.errors import StageError

if TYPE_CHECKING:
    from toolkit.config import Target

_COMFORTABLE_BYTES = 30e9  # an NGC image, and room to build on it


def examine(target: Target | None = None) -> list[Check]:
    """Examine the container engine of this machine, or of a target's, and what the target needs of it."""
    from toolkit.devices import open_device

    try:
        device = None
        if target is not None:
            host = target.build.on if target.where == "container" else target.host
            device = open_device(host, target, Path("build"))
        engine = find_engine(device)
    except StageError as error:
        return [Check("engine", "fail", error.message, error.hint)]
    checks = [Check("engine", "pass", f"{engine.command} answers, for {engine.platform}")]
    needs_gpu = target is not None and target.runtime == "tensorrt"
    try:
        checks.append(Check("gpu", "pass", " ".join(require_gpu(engine))))
    except StageError as error:
        checks.append(Check("gpu", "fail" if needs_gpu else "warn", error.message, error.hint))
    checks.append(_examine_disk(engine))
    if target is None or device is None:
        return checks
    try:
        choice = images.image_for(target, device.facts())
    except StageError as error:
        return [*checks, Check("image", "fail", error.message, error.hint)]
    if inspect(engine, choice.image) is not None:
        return [*checks, Check("image", "pass", f"{choice.image} is there ({choice.why})")]
    source = f"is built on {choice.base}" if choice.build else "is pulled"
    hint = f"now: toolkit containers build {choice.build}" if choice.build else None
    return [
        *checks,
        Check("image", "warn", f"{choice.image} {source} when it is first needed ({choice.why})", hint),
    ]


def _examine_disk(engine: ContainerEngine) -> Check:
    lines: list[str] = []
    engine.run(["df", "-Pk", engine.storage], on_line=lines.append)
    if len(lines) < 2:
        return Check("disk", "warn", f"the free space of {engine.storage} is not known")
    free = int(lines[1].split()[3]) * 1024
    text = f"{units.size(free)} free in {engine.storage}"
    if free >= _COMFORTABLE_BYTES:
        return Check("disk", "pass", text)
    return Check("disk", "warn", f"{text}; an NGC image takes about 20 GB", f"{engine.command} system prune")
