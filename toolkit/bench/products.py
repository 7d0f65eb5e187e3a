"""The convolutions and matrix products of an ONNX graph: their FLOPs, their widths, what is named after them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toolkit import graphs

if TYPE_CHECKING:
    import onnx

_MATRICES = ("Gemm", "MatMul")
_PRODUCTS = ("Conv", "ConvTranspose", *_MATRICES)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product.

    Attributes:
        name: Of the node.
        tensors: What it writes, and what single-input operators make of that: runtimes fuse those into it, and name
            the result after the last.
        flops: 2 × MAC for one image, as :mod:`toolkit.compression.flops` counts; bias and activation left out.
        in_channels: Width of its input, all groups together; None where no weights meet it.
        out_channels: Likewise of its output.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        is_first: Whether it reads the image, whose channels nobody can choose.
        is_last: Whether it writes the network's output, likewise.
    """

    name: str
    tensors: frozenset[str]
    flops: int
    in_channels: int | None
    out_channels: int | None
    precision: str
    is_first: bool
    is_last: bool


def products(path: Path) -> list[Product]:
    """Return the products of a graph, in its order.

    Args:
        path: An ONNX file that takes uint8 ``(N, 3, S, S)``, as exported and quantised ones do.
    """
    import onnx

    model = onnx.load(path)
    graph = model.graph
    constant = {tensor.name for tensor in graph.initializer}
    after: set[str] = set()  # tensors that a product leads to
    found = []
    for node in graph.node:
        if all(name in constant for name in node.input if name):
            constant |= set(node.output)
            continue
        is_first = not after & set(node.input)
        if node.op_type in _PRODUCTS or not is_first:
            after |= set(node.output)
        if node.op_type in _PRODUCTS:
            found.append((node, is_first))
    before: set[str] = set()  # tensors that lead to a product
    last = set()
    for node in reversed(graph.node):
        leads = before & set(node.output)
        if node.op_type in _PRODUCTS and not leads:
            last.add(node.output[0])
        if node.op_type in _PRODUCTS or leads:
            before |= set(node.input)

    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    precisions = graphs.precisions(path)
    shapes = _shapes(model, {name for node, _ in found for name in (*node.input[:2], node.output[0])})
    made = []
    for node, is_first in found:
        tensors = frozenset(_passed_on(node.output[0], readers, constant))
        precision = precisions.get(node.name, "fp32")
        made.append(
            Product(
                node.name, tensors, *_count(node, shapes, constant), precision, is_first, node.output[0] in last
            )
        )
    return made


def _shapes(model: onnx.ModelProto, names: set[str]) -> dict[str, Shape]:
    """Return the shapes of tensors by computing one image: inference stops at amounts that the graph computes."""
    import onnx

    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    told = [value.name for value in model.graph.output]
    asked = [name for name in names if name not in shapes and name not in told]
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)
    size = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    values = graphs.run_onnx(shown.SerializeToString(), np.zeros((1, *size), np.uint8), 1)
    return shapes | {name: value.shape for name, value in zip([*told, *asked], values, strict=True)}


def _count(
    node: onnx.NodeProto, shapes: dict[str, Shape], constant: set[str]
) -> tuple[int, int | None, int | None]:
    """Return FLOPs, and channels in and out."""
    left, right, out = (shapes[name] for name in (*node.input[:2], node.output[0]))
    if node.op_type in _MATRICES:
        transposed = any(option.name == "transA" and option.i for option in node.attribute)
        inner = left[0] if transposed else left[-1]
        flops = 2 * math.prod(out) * inner
        return (flops, inner, out[-1]) if constant & set(node.input[:2]) else (flops, None, None)
    swept = left if node.op_type == "ConvTranspose" else out
    return 2 * math.prod(swept) * math.prod(right[1:]), left[1], out[1]


def _passed_on(tensor: str, readers: Mapping[str, list[onnx.NodeProto]], constant: set[str]) -> list[str]:
    """Return a tensor and what follows from it alone, one operator after another, up to the next product."""
    chain = [tensor]
    while len(following := readers.get(chain[-1], [])) == 1:
        (reader,) = following
        others = {name for name in reader.input if name} - {chain[-1]} - constant
        if reader.op_type in _PRODUCTS or others:
            break
        chain.append(reader.output[0])
    return chain
