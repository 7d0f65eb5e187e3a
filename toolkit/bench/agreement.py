"""What the device computed, held against ONNX Runtime on the host: stands in accuracy's place without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.bench.reference import load
from toolkit.config import Precision
from toolkit.errors import StageError
from toolkit.graphs import difference
from toolkit.store import Artifact

PROBED = 16
# of an image's largest logit: TF32 products in an fp32 engine, other kernels and roundings in fp16, int8 and fp8;
# what computes something else is off by about 1
_TOLERANCE = {"fp32": 0.02, "fp16": 0.05, "int8": 0.25, "fp8": 0.25}


def agreement(reference: Artifact, logits: Path) -> dict[str, Any]:
    """Compare the device's logits with those of the exported fp32 graph on the same test images.

    Args:
        reference: What the host's ONNX Runtime said of them.
        logits: What came back: float32 ``(N, ...)`` for all of them, in order.

    Returns:
        ``images`` (how many), ``top1`` (share with the same largest logit, 0 to 1; None unless the output is
        ``(N, classes)``) and ``max_absolute`` (largest difference of two logits).
    """
    apart = difference(load(reference, "exported"), np.load(logits, mmap_mode="r"))
    return {"images": apart["images"], "top1": apart["top1_agreement"], "max_absolute": apart["max_absolute"]}


def require_alike(reference: Artifact, logits: NDArray[Any], precision: Precision, where: str) -> None:
    """Raise StageError unless a device computes what the graph that its engine was built from says.

    Args:
        reference: What the host's ONNX Runtime says of that graph.
        logits: What the device says of the first test images, ``(N, ...)``.
        precision: The engine's.
        where: The device's name, for the message.
    """
    apart = difference(load(reference, "graph")[: len(logits)], logits)["max_relative"]
    if not apart <= _TOLERANCE[precision]:  # not a number is not alike
        raise StageError(
            f"the engine on {where} computes something else than its graph: logits differ by {apart:.2g} of the "
            f"largest, {_TOLERANCE[precision]:g} is allowed for {precision}",
            "build it again (--rerun build), or choose another precision (--precision)",
        )
