"""What the device computed, held against ONNX Runtime on the host: stands in accuracy's place without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from toolkit.compression import data as datasets
from toolkit.graphs import difference, run_onnx
from toolkit.store import Artifact, Progress

_IMAGES = 1000


def agreement(exported: Artifact, data: Artifact, logits: Path, progress: Progress) -> dict[str, Any]:
    """Compare the device's logits with those of the exported fp32 graph on the same test images.

    Args:
        exported: The fp32 graph that the engine comes from.
        data: Its test images went to the device.
        logits: What came back: float32 ``(N, ...)`` for all of them, in order; at most 1,000 are compared.
        progress: Told how far it is.

    Returns:
        ``images`` (how many), ``top1`` (share with the same largest logit, 0 to 1; None unless the output is
        ``(N, classes)``) and ``max_absolute`` (largest difference of two logits).
    """
    found = np.load(logits, mmap_mode="r")[:_IMAGES]
    images = datasets.load_images(data, "test")[:_IMAGES]
    batch = 64 if exported.meta["batch"] == "dynamic" else 1
    (expected,) = run_onnx(exported.file("model.onnx").read_bytes(), images, batch, progress)
    apart = difference(expected, found)
    return {"images": apart["images"], "top1": apart["top1_agreement"], "max_absolute": apart["max_absolute"]}
