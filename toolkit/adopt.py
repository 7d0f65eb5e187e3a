"""A user's ONNX file in the place of an exported network: made to take bytes, and compared with itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from toolkit import __version__
from toolkit.compression import data as datasets
from toolkit.compression.data import Images
from toolkit.errors import StageError, UsageError
from toolkit.graphs import INPUT, OUTPUT, RELATIVE, Array, difference, run_onnx, top1
from toolkit.onnxfile import IMAGE_TYPES, Source
from toolkit.store import Artifact, Work
from toolkit.workload import Model, Normalization

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's mode L
_COMPARED_IMAGES = 256


def adopt(work: Work, data: Artifact, model: Model, source: Source) -> dict[str, Any]:
    """Write ``model.onnx``: uint8 ``(N, 3, S, S)`` ``images`` in, float32 ``logits`` out, the user's nodes between.

    The batch becomes dynamic where the graph bears it, and is 1 otherwise.

    Returns:
        The same as :func:`toolkit.export.export`; ``accuracy`` is that of ONNX Runtime on the test images, None
        without labels, and ``batch`` is ``dynamic`` or 1.

    Raises:
        UsageError: ONNX Runtime does not take the file, or its output does not fit the data's classes.
        StageError: What was written computes something else than the file.
    """
    original = onnx.load(source.path, format="protobuf")
    images = datasets.load_images(data, "test")
    wrapped, batch, shape = _with_any_batch(original, source, model.normalization)
    classes = data.meta["classes"]
    if classes and shape != [len(classes)]:
        raise UsageError(
            f"the data have {len(classes)} classes, and an image's output of {source.path} has the shape {shape}",
            "give the data that it was trained on, or measure without labels: --data inputs:FILE.npy or none",
        )
    _set_properties(wrapped, source, classes)
    path = work.out / "model.onnx"
    onnx.save(wrapped, path)
    onnx.checker.check_model(str(path))
    some = images if classes else images[:_COMPARED_IMAGES]
    (found,) = run_onnx(path.read_bytes(), some, 64 if batch == "dynamic" else 1, work.progress)
    return {
        "comparison": {"with": "the file", **_compare(original, source, model.normalization, some, found)},
        "opset": source.opset,
        "bytes": path.stat().st_size,
        "input": {"name": INPUT, "shape": [3, source.size, source.size]},
        "batch": batch,
        "outputs": shape,
        "accuracy": top1(datasets.load(data, "test").labels, found) if classes else None,
        "classes": classes,
    }


def _with_any_batch(
    original: onnx.ModelProto, source: Source, normalization: Normalization | None
) -> tuple[onnx.ModelProto, str | int, list[int]]:
    """Return the wrapped graph, its batch, and the shape of an image's output, proved with ONNX Runtime."""
    two = np.random.default_rng(0).integers(0, 256, (2, 3, source.size, source.size), np.uint8)
    problem = ""
    for batch in ("dynamic", 1):
        wrapped = _wrap(original, source, normalization, batch)
        content = wrapped.SerializeToString()
        try:
            (single,) = run_onnx(content, two, 1)
            (pair,) = run_onnx(content, two, 2 if batch == "dynamic" else 1)
        except Exception as error:  # ONNX Runtime has a dozen of its own, without a common base
            problem = str(error).splitlines()[0].split(" : ", 3)[-1]  # after its name, number and kind
            continue
        if single.shape == pair.shape and len(single) == 2 and _close(difference(single, pair), source):
            _set_shapes(wrapped.graph, source, batch, list(single.shape[1:]))
            return wrapped, batch, list(single.shape[1:])
        problem = f"two images do not give two outputs: {list(pair.shape)}"
    raise UsageError(
        f"ONNX Runtime cannot run {source.path} on {source.size}×{source.size} images: {problem}",
        "export it again with a dynamic batch, operators of ONNX itself and this input size",
    )


def _wrap(
    original: onnx.ModelProto, source: Source, normalization: Normalization | None, batch: str | int
) -> onnx.ModelProto:
    """Return the graph with preprocessing before it and a cast to float32 after it; the user's names stay."""
    model = onnx.ModelProto()
    model.CopyFrom(original)
    model.ir_version = max(model.ir_version, 4)  # weights need not be inputs from there on
    graph = model.graph
    before, weights, last = _preprocessing(source, normalization)
    output = graph.output[0]
    is_half = output.type.tensor_type.elem_type == TensorProto.FLOAT16
    _rename(
        graph,
        {
            INPUT: f"model/{INPUT}",
            OUTPUT: f"model/{OUTPUT}",
            source.input: last,
            source.output: "toolkit/half" if is_half else OUTPUT,
        },
    )
    nodes = [*before, *graph.node]
    if is_half:
        nodes.append(helper.make_node("Cast", ["toolkit/half"], [OUTPUT], "toolkit/logits", to=TensorProto.FLOAT))
    del graph.node[:], graph.value_info[:]  # the shapes there are of the old batch
    graph.node.extend(nodes)
    graph.initializer.extend(weights)
    _set_shapes(graph, source, batch, None)
    return model


def _preprocessing(
    source: Source, normalization: Normalization | None
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], str]:
    """Return nodes and constants from ``images`` to what the user's graph takes, and the name of that."""
    steps: list[tuple[str, Array | None, dict[str, Any]]] = []
    if source.channels == 1 or normalization is not None:
        steps.append(("Cast", None, {"to": TensorProto.FLOAT}))
    if source.channels == 1:
        steps.append(("Mul", _LUMA.reshape(1, 3, 1, 1), {}))
        if source.opset < 13:
            steps.append(("ReduceSum", None, {"axes": [1]}))
        else:
            steps.append(("ReduceSum", np.array([1], np.int64), {}))
    if normalization is not None:
        mean, scale = 255 * np.array(normalization.mean), 1 / (255 * np.array(normalization.std))
        if mean.any():
            steps.append(("Sub", mean.astype(np.float32).reshape(1, -1, 1, 1), {}))
        if (scale != 1).any():
            steps.append(("Mul", scale.astype(np.float32).reshape(1, -1, 1, 1), {}))
    elif source.channels == 1:
        steps.append(("Round", None, {}))
    if steps and source.type != TensorProto.FLOAT:
        steps.append(("Cast", None, {"to": source.type}))
    if source.channels_last:
        steps.append(("Transpose", None, {"perm": [0, 2, 3, 1]}))
    nodes, constants, last = [], [], INPUT
    for number, (operator, constant, attributes) in enumerate(steps):
        name = f"toolkit/{number}/{operator}"
        inputs = [last]
        if constant is not None:
            constants.append(numpy_helper.from_array(constant, f"{name}/constant"))
            inputs.append(f"{name}/constant")
        nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        last = name
    return nodes, constants, last


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors, in inner graphs too."""
    sparse = [tensor.values for tensor in graph.sparse_initializer]
    for value in [*graph.input, *graph.output, *graph.initializer, *sparse]:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                _rename(inner, names)


def _set_shapes(graph: onnx.GraphProto, source: Source, batch: str | int, output: list[int] | None) -> None:
    """Declare input and output; the output's shape is open until it is known."""
    first = "batch" if batch == "dynamic" else batch
    del graph.input[:], graph.output[:]
    image = [first, 3, source.size, source.size]
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, image))
    shape = None if output is None else [first, *output]
    graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, shape))


def _set_properties(model: onnx.ModelProto, source: Source, classes: list[str]) -> None:
    properties = {entry.key: entry.value for entry in model.metadata_props}
    ours = {
        "classes": json.dumps(classes),
        "input_size": str(source.size),
        "source_sha256": source.digest,
        "producer": f"toolkit {__version__}",
    }
    helper.set_model_props(model, properties | ours)


def _compare(
    original: onnx.ModelProto, source: Source, normalization: Normalization | None, images: Images, found: Array
) -> dict[str, Any]:
    """Hold what the new graph computes against the user's file on images that NumPy has normalised."""
    images, found = images[:_COMPARED_IMAGES], found[:_COMPARED_IMAGES]
    batch = source.batch or 1
    whole = np.arange(-(-len(images) // batch) * batch) % len(
        images
    )  # full batches, for a file whose batch is fixed
    pixels = _normalize(images[whole], source, normalization)
    expected = run_onnx(original.SerializeToString(), pixels, batch)[0][: len(images)]
    apart = difference(expected, found)
    if not _close(apart, source):
        raise StageError(
            f"with its preprocessing inside, {source.path} computes something else: its output differs by "
            f"{apart['max_absolute']:.3g} (relative {apart['max_relative']:.3g})",
            "put the preprocessing into the network before exporting it, and take uint8 images",
        )
    return apart


def _normalize(images: Images, source: Source, normalization: Normalization | None) -> Array:
    pixels: Array = images.astype(np.float64)
    if source.channels == 1:
        pixels = (pixels * _LUMA.reshape(1, 3, 1, 1)).sum(1, keepdims=True)
    if normalization is None:
        pixels = np.rint(pixels)
    else:
        mean, std = (np.reshape(values, (1, -1, 1, 1)) for values in (normalization.mean, normalization.std))
        pixels = (pixels / 255 - mean) / std
    pixels = pixels.astype(IMAGE_TYPES[source.type])
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)) if source.channels_last else pixels


def _close(apart: dict[str, Any], source: Source) -> bool:
    """Tell whether a difference is one of rounding, relative to the outputs: those of a softmax are all small."""
    return bool(apart["max_relative"] <= (10 if source.type == TensorProto.FLOAT16 else 1) * RELATIVE)
