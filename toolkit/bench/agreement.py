"""What the device computed, held against ONNX Runtime on the host: stands in accuracy's place without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.compression import data as datasets
from toolkit.config import Precision
from toolkit.errors import StageError
from toolkit.graphs import difference, run_onnx
from toolkit.store import Artifact, Progress

_IMAGES = 1000
PROBED = 16
# of an image's largest logit: TF32 products in an fp32 engine, other kernels and roundings in fp16 and int8; what
# computes something else is off by about 1
_TOLERANCE = {"fp32": 0.02, "fp16": 0.05, "int8": 0.25}


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


def require_alike(graph: Artifact, data: Artifact, logits: NDArray[Any], precision: Precision, where: str) -> None:
    """Raise StageError unless a device computes what the graph that its engine was built from says.

    Args:
        graph: The graph, in the engine's precision.
        data: Its first test images were computed there.
        logits: What came of them, ``(N, ...)``.
        precision: The engine's.
        where: The device's name, for the message.
    """
    images = datasets.load_images(data, "test")[: len(logits)]
    (expected,) = run_onnx(graph.file("model.onnx").read_bytes(), images, batch=1)
    apart = difference(expected, logits)["max_relative"]
    if not apart <= _TOLERANCE[precision]:  # not a number is not alike
        raise StageError(
            f"the engine on {where} computes something else than its graph: logits differ by {apart:.2g} of the "
            f"largest, {_TOLERANCE[precision]:g} is allowed for {precision}",
            "build it again (--rerun build), or choose another precision (--precision)",
        )
