"""FLOPs against time, on what real runtimes tell of real networks."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from toolkit import export
from toolkit.agent import facts
from toolkit.agent.ort import Session
from toolkit.bench.products import products
from toolkit.bench.staircase import multiple, staircase
from toolkit.compression import calibration, flops, models
from toolkit.compression.spelling import spell
from toolkit.workload import Model

AVX512 = {"vector_bits": 512, "gpus": []}
Layers = list[dict[str, Any]]


class Narrow(nn.Module):
    """Widths that fit nothing, a depthwise and a transposed convolution, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 20, 3, stride=2)
        self.depthwise = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.side = nn.Conv2d(20, 32, 1)
        self.up = nn.ConvTranspose2d(20, 32, 1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.depthwise(x))
        x = self.side(x) + torch.relu(self.up(x))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def write(network: nn.Module, folder: Path, size: int = 32) -> Path:
    """A network as the toolkit exports it."""
    wrapped = export._WithPreprocessing(network.eval(), [0.5] * 3, [0.25] * 3).eval()
    batch = {0: "batch"}
    torch.onnx.export(
        wrapped,
        (torch.zeros(2, 3, size, size, dtype=torch.uint8),),
        str(folder / "model.onnx"),
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": batch, "logits": batch},
        opset_version=export.OPSET,
        dynamo=False,
    )
    return folder / "model.onnx"


def int8(source: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (32, 3, 32, 32), np.uint8)
    target = source.with_name("int8.onnx")
    model = calibration.prepare(source)
    onnx.save(spell(model, calibration.calibrate(model, images, 32)["minmax"], "onnxruntime", "int8"), target)
    return target


def profile(graph: Path) -> Layers:
    """What ONNX Runtime's profiler tells of an engine of the graph."""
    engine = graph.with_name("engine.onnx")
    Session(str(graph), 1, optimize=True, save_to=str(engine))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.profile_file_prefix = str(graph.with_name("trace"))
    session = ort.InferenceSession(str(engine), options, providers=["CPUExecutionProvider"])
    for _ in range(30):
        session.run(None, {"images": np.zeros((1, 3, 32, 32), np.uint8)})
    times = defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event["name"].endswith("_kernel_time"):
            index = int(event["args"]["node_index"])
            times[index, event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event["dur"])
    return [
        {"name": name, "type": kind, "us": statistics.median(durations), "nodes": []}
        for (_, name, kind), durations in sorted(times.items())
    ]


def told(folder: Path) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((folder / "staircase.json").read_text())
    return whole


@pytest.mark.parametrize("name", ["resnet20", "torchvision:mobilenet_v3_small"])
def test_flops_are_those_that_pruning_counts(tmp_path: Path, name: str) -> None:
    network = models.build(Model.parse(name), 10, seed=0).eval()
    counted = sum(product.flops for product in products(write(network, tmp_path)))
    assert counted == pytest.approx(flops.flops(network, 32), rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_product_is_found_in_what_onnx_runtime_tells(tmp_path: Path, precision: str) -> None:
    graph = write(models.build(Model.parse("resnet20"), 10, seed=0), tmp_path)
    if precision == "int8":
        graph = int8(graph)
    layers = profile(graph)
    found = staircase(tmp_path, graph, layers, AVX512, "onnxruntime")
    assert found
    assert "not to be told" not in found["sentence"]
    whole = told(tmp_path)
    assert [row["name"] for row in whole["layers"]] == [product.name for product in products(graph)]
    assert sum(row["flops_share"] for row in whole["layers"]) == pytest.approx(1)
    times = sum(row["us"] for row in whole["layers"])
    assert times + whole["other_us"] == pytest.approx(sum(layer["us"] for layer in layers))
    assert sum(row["time_share"] for row in whole["layers"]) == pytest.approx(
        times / sum(layer["us"] for layer in layers)
    )
    assert all(("onv" in row["type"]) == (row["name"] != "/network/fc/Gemm") for row in whole["layers"])
    assert found["sentence"].endswith("none of 20 miss a multiple of 16 channels")


def test_nodes_without_names_are_found_in_order(tmp_path: Path) -> None:
    graph = write(Narrow(), tmp_path)
    model = onnx.load(graph)
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, graph)
    layers = [layer | {"name": ""} for layer in profile(graph)]
    found = staircase(tmp_path, graph, layers, AVX512, "onnxruntime")
    assert found
    assert "not to be told" not in found["sentence"]
    rows = told(tmp_path)["layers"]
    assert len(rows) == 5
    assert sum(row["flops_share"] for row in rows) == pytest.approx(1)


def test_openvinos_names_are_understood(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    graph = write(models.build(Model.parse("resnet20"), 10, seed=0), tmp_path)
    for path in (graph, int8(graph)):
        compiled = openvino.Core().compile_model(str(path), "CPU", {"PERF_COUNT": True})
        request = compiled.create_infer_request()
        request.infer({0: np.zeros((1, 3, 32, 32), np.uint8)})
        layers = [
            {"name": info.node_name, "type": info.node_type, "us": info.real_time.microseconds, "nodes": []}
            for info in request.profiling_info
            if "EXECUTED" in str(info.status)
        ]
        found = staircase(tmp_path, path, layers, AVX512, "openvino")
        assert found
        assert "not to be told" not in found["sentence"], path
        assert len(told(tmp_path)["layers"]) == 20


def test_tensorrts_names_are_understood(tmp_path: Path) -> None:
    """Names as TensorRT fuses them; its copies bear the name of the layer that they serve."""
    graph = write(Narrow(), tmp_path)
    names = [
        ("Reformatting CopyNode for Input Tensor 0 to /network/first/Conv + /network/Relu", "Reformat", 90),
        ("/network/first/Conv + /network/Relu", "CaskConvolution", 10),
        ("/network/depthwise/Conv + /network/Relu_1", "CaskConvolution", 5),
        ("/network/up/ConvTranspose + /network/Relu_2", "CaskDeconvolution", 5),
        ("/network/side/Conv + /network/Add", "CaskConvolution", 5),
        ("/network/ReduceMean", "Reduce", 4),
        ("__myl_Fc_myl0_1", "kgen", 1),
    ]
    layers = [{"name": name, "type": kind, "us": us, "nodes": []} for name, kind, us in names]
    layers[-1]["nodes"] = ["/network/fc/Gemm"]
    found = staircase(tmp_path, graph, layers, {"vector_bits": 128}, "tensorrt")
    assert found
    first, second = found["sentence"].split("; ")
    assert first == "the layers with FLOPs take 22% of the time"
    assert second == "78% goes to Reformat and Reduce, which have none to prune"
    assert [row["us"] for row in told(tmp_path)["layers"]] == [10, 5, 5, 5, 1]


def test_a_layer_that_stands_for_several_has_the_flops_of_all(tmp_path: Path) -> None:
    graph = write(Narrow(), tmp_path)
    asked = {product.name: product for product in products(graph)}
    both = ["/network/first/Conv", "/network/depthwise/Conv"]
    layers = [{"name": "__myl_0", "type": "kgen", "us": 7.0, "nodes": both}]
    found = staircase(tmp_path, graph, layers, AVX512, "onnxruntime")
    assert found
    (row,) = told(tmp_path)["layers"]
    assert row["flops"] == sum(asked[name].flops for name in both)
    assert (row["name"], row["time_share"]) == ("/network/first/Conv", 1)
    assert found["sentence"].endswith("3 more are not to be told in the profile")


def test_widths_and_the_next_useful_ones(tmp_path: Path) -> None:
    graph = write(Narrow(), tmp_path)
    sentence = staircase(tmp_path, graph, profile(graph), AVX512, "onnxruntime")
    rows = {row["name"].split("/")[2]: row for row in told(tmp_path)["layers"]}
    keys = ("in_channels", "out_channels", "multiple", "misses", "next_width")
    assert {name: tuple(row[key] for key in keys) for name, row in rows.items()} == {
        "first": (3, 20, 16, True, 16),  # the image's three are not its fault
        "depthwise": (20, 20, 16, True, 16),
        "side": (20, 32, 16, True, 16),
        "up": (20, 32, 16, True, 16),
        "fc": (32, 10, 16, False, None),  # nor are the ten classes
    }
    assert sentence
    assert "4 of 5 miss a multiple of 16 channels" in sentence["sentence"]
    out = 15 * 15
    assert rows["depthwise"]["flops"] == 2 * out * 20 * 9
    assert rows["up"]["flops"] == rows["side"]["flops"] == 2 * out * 20 * 32


@pytest.mark.parametrize(
    ("runtime", "precision", "expected"),
    [
        ("onnxruntime", "fp32", 16),
        ("openvino", "int8", 16),
        ("tensorrt", "int8", 16),
        ("tensorrt", "fp16", 8),
        ("tensorrt-rtx", "fp16", 8),
        ("tensorrt", "fp32", None),
    ],
)
def test_the_multiple_is_the_hardwares(runtime: str, precision: str, expected: int | None) -> None:
    assert multiple(AVX512, runtime, precision) == expected


@pytest.mark.parametrize(
    ("flags", "bits"),
    [("fpu sse2 avx avx2 avx512f", 512), ("sse2 avx", 256), ("fp asimd evtstrm", 128), ("sse2", 128), ("", None)],
)
def test_the_width_of_a_vector(flags: str, bits: int | None) -> None:
    assert facts.vector_bits(flags) == bits
    assert multiple({"vector_bits": bits}, "onnxruntime", "fp32") == (bits and bits // 32)


def test_without_a_profile_or_without_products_there_is_none(tmp_path: Path) -> None:
    graph = write(Narrow(), tmp_path)
    assert staircase(tmp_path, graph, None, AVX512, "onnxruntime") is None
    unknown = [
        {"name": "{ForeignNode[/network/first/Conv.../network/fc/Gemm]}", "type": "DLA", "us": 9, "nodes": []}
    ]
    assert staircase(tmp_path, graph, unknown, AVX512, "tensorrt") is None
    assert not (tmp_path / "staircase.json").exists()
