"""ONNX graphs: run on the host, held against something else, asked for their precision."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolkit.store import Progress

if TYPE_CHECKING:
    import onnxruntime

INPUT, OUTPUT = "images", "logits"
ABSOLUTE, RELATIVE = 1e-3, 1e-3  # fp32 in another order of operations; measured differences are near 1e-5

Array = NDArray[Any]


def session(model: bytes) -> onnxruntime.InferenceSession:
    """Load a serialised model on the CPU, without graph optimisations.

    With as many threads as ``OMP_NUM_THREADS`` says, which ONNX Runtime does not read: those of several processes
    would wait actively, each on every core.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # whatever is wrong is in the exception
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    options.intra_op_num_threads = int(threads) if threads.isdecimal() else 0  # 0: one a core
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_onnx(
    model: bytes, images: Array, batch: int = 64, progress: Progress = lambda done, total, text: None
) -> list[Array]:
    """Return every output of an ONNX model with one input, on the CPU and without graph optimisations.

    Args:
        model: The serialised model.
        images: ``(N, ...)`` in the type that the model takes.
        batch: Images a call; N need not be a multiple of it.
        progress: Told how far it is.
    """
    loaded = session(model)
    name = loaded.get_inputs()[0].name
    parts = []
    for start in range(0, len(images), batch):
        progress(start, len(images), "ONNX Runtime")
        parts.append(loaded.run(None, {name: images[start : start + batch]}))
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def difference(expected: Array, found: Array) -> dict[str, Any]:
    """Say how far two results for the same images, ``(N, ...)`` floats, are apart.

    Returns:
        ``images``, ``max_absolute`` and ``max_relative`` (to the largest value of the image), and
        ``top1_agreement``, None unless the results are ``(N, classes)``.
    """
    first, second = (np.asarray(value, np.float32).reshape(len(value), -1) for value in (expected, found))
    apart = np.abs(first - second)
    relative = apart.max(1) / np.maximum(np.abs(first).max(1), 1e-6)
    return {
        "images": len(expected),
        "max_absolute": float(f"{apart.max():.3g}"),
        "max_relative": float(f"{relative.max():.3g}"),
        "top1_agreement": top1(expected.argmax(1), found) if expected.ndim == 2 else None,
    }


def top1(labels: Array, logits: Array) -> float:
    """Return the share of images, 0 to 1, whose largest of ``(N, classes)`` logits is at the label."""
    return float((logits.argmax(1) == labels).mean())


_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def precisions(path: Path) -> dict[str, str]:
    """Return the precision that each convolution and matrix product asks for, by node name.

    ``int8`` or ``fp8`` where activations and weights come out of DequantizeLinear, otherwise the type of the
    activations: ``fp32``, ``fp16`` or ``bf16``.
    """
    import onnx

    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.input]}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    dequantized = {
        node.output[0]: "fp8" if types.get(node.input[-1]) == onnx.TensorProto.FLOAT8E4M3FN else "int8"
        for node in graph.node
        if node.op_type == "DequantizeLinear"
    }
    found = {}
    for node in graph.node:
        if node.op_type in _PRODUCTS and node.name:
            quantized = node.input[0] in dequantized and node.input[1] in dequantized
            precision = dequantized[node.input[0]] if quantized else names.get(types.get(node.input[0]))
            if precision is not None:
                found[node.name] = precision
    return found
