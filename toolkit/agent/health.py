"""The health check: does a release run here, now."""

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
    root, release = request["root"], request["id"]
    folder = os.path.join(root, "releases", release)
    releases.require_whole(folder)
    description = engine.read(folder, root)
    if description["runtime"] == "tensorrt" and not measure.can_run_plans():
        try:
            measure.time_plan(folder, description, batch=1, warmup_ms=0, duration_ms=0, queries=1)
        except OutOfMemory as reason:
            raise Refusal(
                "the engine does not run: {}".format(reason), "stop what else runs on the device"
            ) from reason
        return {"id": release}
    image = np.load(os.path.join(folder, "evaluation", "images.npy"), mmap_mode="r")[:1]
    session = engine.load(folder, root)
    logits = session.run(np.array(image))
    session.close()
    if not np.isfinite(logits).all():
        raise Refusal("the engine computes values that are not numbers", "build it again (--rerun build)")
    return {"id": release}
