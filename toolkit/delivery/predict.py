"""What a device's current release says of images on this machine."""

from __future__ import annotations

import io
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.agent import images
from toolkit.agent.model import Answer
from toolkit.devices.agent import Agent
from toolkit.errors import StageError, UsageError


def current(agent: Agent, target: str) -> dict[str, Any]:
    """Return the manifest of the current release; raises StageError when there is none."""
    manifest = agent.ask("manifest", {"root": agent.device.root})["manifest"]
    if manifest is None:
        raise StageError(f"no release is current on {agent.device.name}", f"bring one there: toolkit run {target}")
    return dict(manifest)


def read(paths: Sequence[str], manifest: dict[str, Any]) -> NDArray[np.uint8]:
    """Return image files as the release takes them, uint8 ``(N, 3, S, S)``; raises UsageError naming a bad one."""
    size = manifest["model"]["input"][-1]
    try:
        return np.stack([images.read(path, size) for path in paths])
    except images.BadImage as problem:
        raise UsageError(problem.message, problem.hint or "give image files") from problem


def answer(batch: NDArray[np.uint8], release: str, agent: Agent) -> Answer:
    """Have a release on the device compute images; nothing of them stays there."""
    device = agent.device
    folder = f"{device.root}/measured/{uuid.uuid4().hex}"
    content = io.BytesIO()
    np.save(content, batch)
    try:
        device.put(content.getvalue(), f"{folder}/images.npy")
        request = {"root": device.root, "id": release, "images": f"{folder}/images.npy"}
        told = agent.ask("predict", request)
    finally:
        device.remove(folder)
    return Answer(np.array(told["logits"], np.float32), told["classes"], told["release"])
