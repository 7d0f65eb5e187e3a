"""Whether a release runs here, and what it computes: before the benchmark, and as the last check of a switch."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from . import engine, measure, releases
from .protocol import OutOfMemory, Refusal


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Load a release's engine and run one image; takes no lock, so that it never waits for a benchmark.

    Args:
        request: ``root`` and ``id``.

    Returns:
        ``id``.

    Raises:
        Refusal: The release is not whole, does not load or run, or computes what is no number.
    """
    logits = _compute(request, 1)
    if logits is not None and not np.isfinite(logits).all():
        raise Refusal("the engine computes values that are not numbers", "build it again (--rerun build)")
    return {"id": request["id"]}


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """Compute the first images of the evaluation data, for the host to hold against its own.

    Args:
        request: ``root``, ``id``, and ``images``: how many.

    Returns:
        ``logits``: a list an image; None where only trtexec can run the engine, which does, but tells no values.

    Raises:
        Refusal: The release is not whole, or does not load or run.
    """
    logits = _compute(request, request["images"])
    return {"logits": None if logits is None else logits.tolist()}


def _compute(request: dict[str, Any], count: int) -> np.ndarray | None:
    root = request["root"]
    folder = os.path.join(root, "releases", request["id"])
    releases.require_whole(folder)
    description = engine.read(folder, root)
    if not measure.can_run(description):
        try:
            measure.time_plan(folder, description, batch=1, warmup_ms=0, duration_ms=0, queries=1)
        except OutOfMemory as reason:
            raise Refusal(
                "the engine does not run: {}".format(reason), "stop what else runs on the device"
            ) from reason
        return None
    images = np.load(os.path.join(folder, "evaluation", "images.npy"), mmap_mode="r")[:count]
    session = engine.load(folder, root)
    logits = measure.evaluate(session, images)
    session.close()
    return logits
