"""PyTorch to ONNX: preprocessing inside the graph, checked, and compared with PyTorch on real images."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import warnings
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toolkit import __version__
from toolkit.compression import data as datasets
from toolkit.compression import models, training
from toolkit.compression.data import Images
from toolkit.errors import StageError
from toolkit.graphs import ABSOLUTE, INPUT, OUTPUT, RELATIVE, difference, run_onnx
from toolkit.store import Artifact, Work
from toolkit.workload import Model

Value = TypeVar("Value")

OPSET = 17  # the newest that TensorRT 8.5 (JetPack 5.1) reads
_COMPARED_IMAGES = 256


class _WithPreprocessing(nn.Module):
    """Takes uint8 ``(N, 3, S, S)`` and normalises inside, so that everybody feeds the same bytes."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.network = network
        self.mean = nn.Buffer(255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.scale = nn.Buffer(1 / (255 * torch.tensor(std).view(1, 3, 1, 1)))

    def forward(self, images: Tensor) -> Tensor:
        out = self.network((images.float() - self.mean) * self.scale)
        assert isinstance(out, Tensor)
        return out


def export(work: Work, data: Artifact, model: Model, tuned: Artifact) -> dict[str, Any]:
    """Write ``model.onnx`` with a dynamic batch, uint8 input ``images`` and float32 output ``logits``.

    The graph's metadata name classes, input size, FLOPs, parameters, accuracy and the hash of the weights.

    Returns:
        ``comparison`` (with whom, and what ``graphs.difference`` says), ``opset``, ``bytes``, ``input`` (name,
        shape after the batch), ``batch`` (``dynamic``), ``outputs`` (shape after the batch), ``accuracy`` (top-1
        of the network on the test images), ``classes``. An ONNX file that is taken over has the same.

    Raises:
        StageError: The network cannot be exported, or ONNX Runtime computes something else than PyTorch.
    """
    classes = data.meta["classes"]
    size = data.meta["input_size"]
    if "model.safetensors" in tuned.files:  # it was never pruned
        network = training.load_baseline(tuned, data, model)
    else:
        network = models.restore(model, len(classes), tuned.file("model.pth"))
    network.eval()
    wrapped = _WithPreprocessing(network, data.meta["mean"], data.meta["std"]).eval()
    path = work.out / "model.onnx"
    _write(wrapped, size, path)
    graph = onnx.load(path)
    onnx.helper.set_model_props(
        graph,
        {
            "classes": json.dumps(classes),
            "input_size": str(size),
            "flops": str(tuned.meta["flops"]),
            "params": str(tuned.meta["params"]),
            "accuracy": f"{tuned.meta['accuracy']:.6f}",
            "weights_sha256": _weights_hash(network),
            "producer": f"toolkit {__version__}",
        },
    )
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)
    work.progress(1, 2, "comparing with PyTorch")
    images = np.array(datasets.load(data, "test").first(_COMPARED_IMAGES).images)
    return {
        "comparison": {"with": "PyTorch", **compare(wrapped, path, images)},
        "opset": OPSET,
        "bytes": path.stat().st_size,
        "input": {"name": INPUT, "shape": [3, size, size]},
        "batch": "dynamic",
        "outputs": [len(classes)],
        "accuracy": tuned.meta["accuracy"],
        "classes": classes,
    }


def export_again(network: nn.Module, data: Artifact, exported: Artifact, path: Path) -> None:
    """Write the graph of a network that was exported before, with the weights that it has now."""
    wrapped = _WithPreprocessing(network, data.meta["mean"], data.meta["std"]).eval()
    _write(wrapped, data.meta["input_size"], path)
    graph = onnx.load(path)
    about = {entry.key: entry.value for entry in onnx.load(exported.file("model.onnx")).metadata_props}
    onnx.helper.set_model_props(graph, about | {"weights_sha256": _weights_hash(network)})
    onnx.save(graph, path)


def _write(wrapped: nn.Module, size: int, path: Path) -> None:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                wrapped,
                (torch.zeros(2, 3, size, size, dtype=torch.uint8),),
                str(path),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
                opset_version=OPSET,
                dynamo=False,  # converts to opset 17 directly and names nodes by module
            )
    except Exception as error:
        raise StageError(
            f"the network cannot be exported to ONNX: {type(error).__name__}: {str(error).splitlines()[0]}",
            f"use operators that ONNX opset {OPSET} has",
        ) from error


def by_module(network: nn.Module, by_node: Mapping[str, Value]) -> dict[str, Value]:
    """Return what is known of the graph's nodes by the names of the modules that they stand for."""
    names = {f"network.{name}" for name, _ in network.named_modules()}
    found = {_module_of(node, names): value for node, value in by_node.items()}
    return {name.removeprefix("network."): value for name, value in found.items() if name is not None}


def _weights_hash(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def compare(network: nn.Module, path: Path, images: Images) -> dict[str, Any]:
    """Compare logits of PyTorch and ONNX Runtime on ``(N, 3, S, S)`` uint8 images.

    Returns:
        What ``graphs.difference`` says.

    Raises:
        StageError: A difference is above tolerance; names the first layer that differs.
    """
    expected = network(torch.from_numpy(images)).numpy()
    (found,) = run_onnx(path.read_bytes(), images)
    apart = difference(expected, found)
    if not (apart["max_absolute"] <= ABSOLUTE or apart["max_relative"] <= RELATIVE):
        layer = first_difference(network, path, images[:8])
        raise StageError(
            f"ONNX Runtime and PyTorch differ by {apart['max_absolute']:.3g} (relative "
            f"{apart['max_relative']:.3g}); the first layer that differs is {layer}",
            "look at that layer's ONNX operators, or replace it by one that exports exactly",
        )
    return apart


@torch.no_grad()
def first_difference(network: nn.Module, path: Path, images: Images) -> str:
    """Return the name of the first layer whose output differs, by running both with every output visible.

    The exporter names nodes by module (``/network/layer1/layer1.0/conv1/Conv``) and folds batch norm into the
    convolution before it, so that a convolution's node is held against both.
    """
    recorded: dict[str, list[NDArray[np.float32]]] = {}
    order: list[str] = []
    hooks = []
    for name, module in network.named_modules():
        if name and not list(module.children()):

            def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                if name not in recorded:
                    order.append(name)
                recorded.setdefault(name, []).append(output.numpy())

            hooks.append(module.register_forward_hook(record))
    network(torch.from_numpy(images))
    for hook in hooks:
        hook.remove()

    graph = onnx.shape_inference.infer_shapes(onnx.load(path))
    types = {
        value.name: value.type.tensor_type.elem_type for value in [*graph.graph.value_info, *graph.graph.output]
    }
    nodes = [node for node in graph.graph.node if types.get(node.output[0]) == onnx.TensorProto.FLOAT]
    shown = [node.output[0] for node in nodes if node.output[0] != OUTPUT]
    graph.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in shown
    )
    values = dict(zip([OUTPUT, *shown], run_onnx(graph.SerializeToString(), images), strict=True))
    last_of = {module: node for node in nodes if (module := _module_of(node.name, recorded)) is not None}
    for module, node in last_of.items():
        after = order[order.index(module) + 1 :][:1]
        found = values[node.output[0]]
        candidates = [value for name in [module, *after] for value in recorded[name] if value.shape == found.shape]
        worst = min((np.abs(c - found).max() / max(np.abs(c).max(), 1e-6) for c in candidates), default=0)
        if not worst <= RELATIVE:
            return f"'{module.removeprefix('network.')}' ({node.op_type})"
    return "after the last layer that can be compared"


def _module_of(node: str, recorded: Container[str]) -> str | None:
    """Return the module that a node's name stands for.

    The exporter joins the modules' names with slashes and repeats a container's name in its children:
    ``/network/layer1/layer1.0/conv1/Conv`` is of ``network.layer1.0.conv1``.
    """
    path: list[str] = []
    for part in node.strip("/").split("/")[:-1]:
        repeated = [i for i in range(len(path)) if part.startswith(".".join(path[i:]) + ".")]
        path = [*path[: repeated[0]], *part.split(".")] if repeated else [*path, part]
    name = ".".join(path)
    return name if name in recorded else None
