"""What the host's ONNX Runtime says of every test image: the measure that a device is held against.

It depends on no device, so that a fleet computes it once.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from toolkit.compression import data as datasets
from toolkit.graphs import run_onnx, top1
from toolkit.store import Artifact, Work


def reference(work: Work, data: Artifact, exported: Artifact, graph: Artifact) -> dict[str, Any]:
    """Write ``exported.logits.npy`` and ``graph.logits.npy``, float32 ``(N, ...)`` of all N test images.

    The graphs run as they are, without optimisations. ``graph.logits.npy`` is left out where the graph is the
    exported one; :func:`load` knows.

    Args:
        work: Output and progress.
        data: Its test images are computed.
        exported: The fp32 graph.
        graph: What the engine is built from: ``exported``, or the same in another precision.

    Returns:
        ``images``, ``precision`` (the engine's) and ``accuracy`` of ``exported`` and ``graph`` (top-1, 0 to 1;
        None without labels).
    """
    images = datasets.load_images(data, "test")
    labels = datasets.load(data, "test").labels if data.meta["classes"] else None
    accuracy: dict[str, float | None] = {}
    same = graph.digest == exported.digest
    graphs = {"exported": exported} if same else {"exported": exported, "graph": graph}
    for name, artifact in graphs.items():
        batch = 64 if exported.meta["batch"] == "dynamic" else 1
        (logits,) = run_onnx(artifact.file("model.onnx").read_bytes(), images, batch, work.progress)
        np.save(work.out / f"{name}.logits.npy", logits.astype(np.float32, copy=False))
        accuracy[name] = None if labels is None else top1(labels, logits)
    return {
        "images": len(images),
        "precision": graph.meta.get("precision", "fp32"),
        "accuracy": {"exported": accuracy["exported"], "graph": accuracy.get("graph", accuracy["exported"])},
    }


def load(reference: Artifact, name: Literal["exported", "graph"]) -> NDArray[np.float32]:
    """Open what a graph said of the test images, float32 ``(N, ...)``, without reading it into memory."""
    file = f"{name}.logits.npy"
    logits: NDArray[np.float32] = np.load(
        reference.file(file if file in reference.files else "exported.logits.npy"), mmap_mode="r"
    )
    return logits
