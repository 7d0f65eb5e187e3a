"""Q/DQ nodes in the dialect that a runtime takes, or is fastest with; all dialects from the same ranges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from toolkit.compression.calibration import Ranges

Spelling = Literal["onnxruntime", "tensorrt"]
Narrow = Literal["int8", "fp8"]

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_TYPES = {"int8": (TensorProto.INT8, 127), "fp8": (TensorProto.FLOAT8E4M3FN, 448)}  # and its largest number
_FP8_OPSET = 19


@dataclass(frozen=True)
class Levels:
    """The 256 values of a tensor in int8: ``scale × (level - zero)`` for each level from ``lowest`` on."""

    scale: float
    zero: int
    lowest: int


def spell(
    model: onnx.ModelProto, ranges: Ranges, spelling: Spelling, precision: Narrow, keep: Collection[str] = ()
) -> onnx.ModelProto:
    """Return a prepared graph with Q/DQ nodes; the graph itself stays as it is.

    Args:
        model: The graph, as ``calibration.prepare`` returns it.
        ranges: Of its activations.
        spelling: ``onnxruntime`` quantises every operator, with uint8 activations of any zero point and int32
            biases: what ONNX Runtime computes without leaving int8, and OpenVINO too. ``tensorrt`` quantises what
            convolutions and matrix products read and the branch that an addition takes beside a product, with
            zero point 0 and float biases: TensorRT refuses other zero points, and fuses a product with its bias,
            addition and activation where no Q/DQ stands between them.
        precision: ``fp8`` (E4M3) is only spelled for ``tensorrt``.
        keep: Names of nodes that stay as they are.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if spelling == "onnxruntime":
        return _everything(copy, ranges, keep)
    if precision == "fp8":
        copy = onnx.version_converter.convert_version(copy, _FP8_OPSET)
    _Writer(copy.graph, ranges, precision).write(keep)
    return copy


def quantised(model: onnx.ModelProto) -> list[str]:
    """Return the names of a spelled graph's nodes that read Q/DQ, for products as weights."""
    made = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return [
        node.name
        for node in model.graph.node
        if made & set(node.input[1:2] if node.op_type in _PRODUCTS else node.input)
        and node.op_type != "QuantizeLinear"
    ]


def input_levels(model: onnx.ModelProto) -> dict[str, Levels]:
    """Return the levels that the quantised products of a graph spelled in int8 read, by the node's name."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for node in model.graph.node:
        source = made.get(node.input[0]) if node.op_type in _PRODUCTS else None
        if source is not None and source.op_type == "DequantizeLinear":
            scale, zero = (numpy_helper.to_array(constants[name]) for name in source.input[1:])
            found[node.name] = Levels(scale.item(), zero.item(), int(np.iinfo(zero.dtype).min))
    return found


def _everything(model: onnx.ModelProto, ranges: Ranges, keep: Collection[str]) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    found = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, found),
        nodes_to_quantize=[],
        nodes_to_exclude=list(keep),
        op_types_to_quantize=[*QLinearOpsRegistry, *QDQRegistry],
        extra_options={},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    spelled: onnx.ModelProto = quantizer.model.model
    return spelled


class _Writer:
    """Puts Q/DQ pairs of zero point 0 into a graph; a tensor that several nodes read has one pair."""

    def __init__(self, graph: onnx.GraphProto, ranges: Ranges, precision: Narrow) -> None:
        self._graph = graph
        self._ranges = ranges
        self._type, self._largest = _TYPES[precision]
        self._weights = {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in graph.initializer
            if tensor.data_type == TensorProto.FLOAT
        }
        self._nodes: list[onnx.NodeProto] = []
        self._written: set[str] = set()

    def write(self, keep: Collection[str]) -> None:
        readers = Counter(name for node in self._graph.node for name in node.input)
        products: list[str] = []  # what the products so far compute for a single reader
        for node in self._graph.node:
            reads = node.name not in keep
            if node.op_type in _PRODUCTS:
                if reads and node.input[0] in self._ranges and node.input[1] in self._weights:
                    node.input[0] = self._activation(node.input[0])
                    node.input[1] = self._weight(node.input[1], node)
                products += [name for name in node.output if readers[name] == 1]
            elif node.op_type == "Add" and reads:
                beside = [name for name in products if name in node.input][-1:]  # the last one is fused
                for index, name in enumerate(node.input):
                    if beside and name not in beside and name in self._ranges:
                        node.input[index] = self._activation(name)
            self._nodes.append(node)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)

    def _activation(self, name: str) -> str:
        low, high = self._ranges[name]
        return self._pair(name, np.float32(max(-low, high)))

    def _weight(self, name: str, node: onnx.NodeProto) -> str:
        weights = np.abs(self._weights[name])
        axis = _output_axis(node, weights.ndim)
        return self._pair(name, weights.max(tuple(set(range(weights.ndim)) - {axis})), axis)

    def _pair(self, name: str, largest: NDArray[np.float32] | np.float32, axis: int | None = None) -> str:
        """Write Q and DQ of a tensor before the node that reads it; return what it reads now."""
        if name not in self._written:
            self._written.add(name)
            # of nothing but zeros any scale will do, except zero, which TensorRT refuses
            scale = np.where(largest > 0, largest / self._largest, 1).astype(np.float32)
            zero = helper.make_tensor(f"{name}_zero_point", self._type, scale.shape, np.zeros(scale.size))
            self._graph.initializer.extend([numpy_helper.from_array(scale, f"{name}_scale"), zero])
            where = {} if axis is None else {"axis": axis}
            ends = [(name, f"{name}_quantized"), (f"{name}_quantized", f"{name}_dequantized")]
            for kind, (before, after) in zip(("QuantizeLinear", "DequantizeLinear"), ends, strict=True):
                inputs = [before, f"{name}_scale", f"{name}_zero_point"]
                self._nodes.append(helper.make_node(kind, inputs, [after], f"{name}_{kind}", **where))
        return f"{name}_dequantized"


def _output_axis(node: onnx.NodeProto, dimensions: int) -> int:
    """Return the axis of a product's weights that its output channels are along."""
    if node.op_type == "Gemm":
        return 0 if any(attribute.name == "transB" and attribute.i for attribute in node.attribute) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": dimensions - 1}[node.op_type]
