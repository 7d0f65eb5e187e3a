"""An ONNX file of the user's: what it says of itself, and why it may not be taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from toolkit.config import Precision
from toolkit.errors import UsageError
from toolkit.store import canonical, sha256_file, sha256_text
from toolkit.workload import Model, Normalization

IMAGE_TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.UINT8: np.uint8}
_LARGEST = 2**31 - 1  # a protobuf message ends there
_INT8_OPSET = 13  # the first whose QuantizeLinear has a scale a channel


@dataclass(frozen=True)
class Source:
    """What an ONNX file says of itself.

    Attributes:
        path: The file.
        digest: Hash of the file and of the weights that lie beside it.
        input: Name of its image input.
        type: ``TensorProto`` type of that input.
        channels: 3, or 1 for grey.
        channels_last: Whether it is NHWC.
        size: Edge length in pixels.
        batch: Its fixed batch, None where that is dynamic.
        output: Name of its output.
        opset: Version of the ONNX operators.
    """

    path: Path
    digest: str
    input: str
    type: int
    channels: int
    channels_last: bool
    size: int
    batch: int | None
    output: str
    opset: int


def read(model: Model, input_size: int, precision: Precision) -> Source:
    """Read an ONNX file's input and output, without its weights.

    Args:
        model: The file, and the normalisation that it expects.
        input_size: Edge length in pixels where the file leaves it open.
        precision: What the graph is going to be quantised to.

    Raises:
        UsageError: It is not ONNX, too large, or not a network of one image input and one output of numbers; or
            its normalisation is missing.
    """
    path = Path(model.name)
    proto = _parse(path)
    files = _files(proto, path)
    if sum(file.stat().st_size for file in files) > _LARGEST:
        raise UsageError(f"{path} has more than 2 GB of weights", "convert it to float16 before")
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise UsageError(f"{path} is not valid ONNX: {str(error).splitlines()[0]}", "export it again") from error
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    if precision in ("int8", "fp8") and opset < _INT8_OPSET:
        raise UsageError(
            f"{path} has ONNX opset {opset}, and {precision} needs {_INT8_OPSET}",
            f"export it again with opset_version={_INT8_OPSET} or newer, or use --precision fp32 or fp16",
        )
    value = _only_input(proto.graph, path)
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]  # 0 where it is dynamic
    if len(shape) != 4 or value.type.tensor_type.elem_type not in IMAGE_TYPES:
        raise UsageError(
            f"the input {_describe(value)} of {path} is no batch of images",
            "the toolkit feeds float32, float16 or uint8 images as (N, C, S, S) or (N, S, S, C)",
        )
    channels_last = shape[1] not in (1, 3) and shape[3] in (1, 3)
    channels, height, width = (shape[3], *shape[1:3]) if channels_last else shape[1:]
    if channels not in (1, 3):
        raise UsageError(
            f"the input {_describe(value)} of {path} has no dimension of 3 or 1 channels",
            "export it again for colour or grey images, with the number of channels in the shape",
        )
    if height and width and height != width:
        raise UsageError(
            f"the input {_describe(value)} of {path} is not square", "export it again for square images"
        )
    source = Source(
        path=path,
        digest=sha256_text(canonical([sha256_file(file) for file in files])),
        input=value.name,
        type=value.type.tensor_type.elem_type,
        channels=channels,
        channels_last=channels_last,
        size=height or width or input_size,
        batch=shape[0] or None,
        output=_only_output(proto.graph, path).name,
        opset=opset,
    )
    _require_normalization(source, model.normalization, _describe(value))
    return source


def _parse(path: Path) -> onnx.ModelProto:
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    except DecodeError:
        raise UsageError(f"{path} is not an ONNX file, or it is damaged", "export it again") from None


def _files(proto: onnx.ModelProto, path: Path) -> list[Path]:
    """Return the file and those beside it that hold its weights."""
    beside = {
        entry.value
        for tensor in _tensors(proto.graph)
        for entry in tensor.external_data
        if tensor.data_location == TensorProto.EXTERNAL and entry.key == "location"
    }
    files = [path, *(path.parent / name for name in sorted(beside))]
    for file in files:
        if not file.is_file():
            raise UsageError(f"{path} keeps weights in {file}, which does not exist", "put it there")
    return files


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from [attribute.t, *attribute.tensors]
            for inner in [attribute.g, *attribute.graphs]:
                yield from _tensors(inner)


def _only_input(graph: onnx.GraphProto, path: Path) -> onnx.ValueInfoProto:
    weights = {tensor.name for tensor in graph.initializer}  # before IR version 4 they are listed as inputs too
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise UsageError(
            f"{path} has {len(inputs)} inputs: {', '.join(map(_describe, inputs))}",
            "export a network with one input of images; onnx.utils.extract_model cuts one out",
        )
    return inputs[0]


def _only_output(graph: onnx.GraphProto, path: Path) -> onnx.ValueInfoProto:
    if len(graph.output) != 1:
        raise UsageError(
            f"{path} has {len(graph.output)} outputs: {', '.join(map(_describe, graph.output))}",
            "keep the one that counts; onnx.utils.extract_model cuts it out",
        )
    output = graph.output[0]
    if output.type.tensor_type.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        raise UsageError(
            f"the output {_describe(output)} of {path} is neither float32 nor float16",
            "export the network's logits, before argmax or any other post-processing",
        )
    return output


def _describe(value: onnx.ValueInfoProto) -> str:
    if not value.type.HasField("tensor_type"):
        return f"'{value.name}' {value.type.WhichOneof('value')}"
    tensor = value.type.tensor_type
    shape = ", ".join(str(dim.dim_value or dim.dim_param or "?") for dim in tensor.shape.dim)
    name = TensorProto.DataType.Name(tensor.elem_type).lower()
    return f"'{value.name}' {'float32' if name == 'float' else name} [{shape}]"


def _require_normalization(source: Source, normalization: Normalization | None, what: str) -> None:
    if source.type == TensorProto.UINT8:
        if normalization is not None:
            raise UsageError(
                f"the input {what} of {source.path} takes bytes as they are",
                "leave out --mean, --std and --input-range",
            )
    elif normalization is None:
        raise UsageError(
            f"the input {what} of {source.path} does not say how its pixels are normalised",
            "say it as in its training: --mean and --std of pixels between 0 and 1 (ImageNet's: "
            "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225), or --input-range 0,1 | 0,255 | -1,1",
        )
    elif max(len(normalization.mean), len(normalization.std)) > source.channels:
        raise UsageError(
            f"the input {what} of {source.path} is grey, and --mean and --std have three numbers", "give one number"
        )
