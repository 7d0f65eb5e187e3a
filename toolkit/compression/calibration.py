"""Ranges of a graph's activations, found once from training images; every spelling of Q/DQ is made from them."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from toolkit import graphs
from toolkit.store import Progress

Ranges = dict[str, tuple[float, float]]

_BATCH = 8  # at most: every activation of so many images is in memory
_SAMPLE = 1024  # values of each activation that are looked at, a batch
_BINS = 2048
_SHARES = np.linspace(0.3, 1.0, 71)  # of the whole range, that are tried
_LEVELS = 255


def prepare(source: Path) -> onnx.ModelProto:
    """Return a graph as quantisers want it: batch norm folded, every shape known, every node with a name."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(path))
        model = onnx.load(path)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return model


def calibrate(
    model: onnx.ModelProto,
    images: NDArray[np.uint8],
    batch: int,
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Ranges]:
    """Return the range of every float32 activation.

    Args:
        model: A prepared graph.
        images: ``(N, 3, S, S)`` uint8, of training.
        batch: Images that the graph takes at once.
        progress: Told how far it is.

    Returns:
        By method: ``minmax`` has the smallest and the largest value seen, ``mse`` the part of that range in which
        256 levels have the least squared error, clipping included, on a random sample of the values.
    """
    watched = _watched(model)
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(watched)
    session = graphs.session(shown.SerializeToString())
    names = [value.name for value in watched]
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    samples: list[list[NDArray[np.float32]]] = [[] for _ in names]
    random = np.random.default_rng(0)
    step = min(batch, _BATCH)
    for start in range(0, len(images), step):
        progress(start, len(images), "calibrating")
        found = session.run(None, {model.graph.input[0].name: np.array(images[start : start + step])})
        for index, values in enumerate(found):
            low[index] = min(low[index], values.min())
            high[index] = max(high[index], values.max())
            samples[index].append(values.ravel()[random.integers(0, values.size, min(_SAMPLE, values.size))])
    whole = {name: (float(low[index]), float(high[index])) for index, name in enumerate(names)}
    least = {name: _least_error(np.concatenate(samples[i]), *whole[name]) for i, name in enumerate(names)}
    return {"minmax": whole, "mse": least}


def _watched(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return what nodes compute as float32."""
    computed = {name for node in model.graph.node for name in node.output}
    return [
        value
        for value in [*model.graph.value_info, *model.graph.output]
        if value.name in computed and value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    ]


def _least_error(sample: NDArray[np.float32], low: float, high: float) -> tuple[float, float]:
    """Return the share of a range with zero in it that 256 levels represent a sample best in."""
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return low, high
    counts, edges = np.histogram(sample, _BINS, (low, high))
    values = (edges[:-1] + edges[1:]) / 2

    def error(share: float) -> float:
        step = share * (high - low) / _LEVELS
        rounded = np.rint(values / step) * step
        return float((counts * (values - np.clip(rounded, share * low, share * high)) ** 2).sum())

    best = min(_SHARES[::-1], key=error)
    return float(best * low), float(best * high)
