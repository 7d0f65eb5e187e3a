"""One calibration, one spelling a runtime, and what stays in fp32 so that accuracy does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from tests.conftest import job_of
from toolkit import export, files, graphs, networks
from toolkit.compression import calibration
from toolkit.compression import data as datasets
from toolkit.compression.calibration import Ranges
from toolkit.compression.quantization import quantize
from toolkit.compression.spelling import Spelling, quantised, spell
from toolkit.errors import StageError
from toolkit.store import Artifact, Store, Work
from toolkit.workload import Data

SPELLINGS = get_args(Spelling)
SIZE = 16


class Residual(nn.Module):
    """A small classifier with an addition, in which one channel is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16 * 16, 10)
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight[7], layer.bias[7] = 0, -1

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x) + x)
        out: Tensor = self.fc(functional.max_pool2d(torch.relu(self.third(x)), 2).flatten(1))
        return out

    def break_int8(self) -> Residual:
        """Give the third convolution weights that do nothing, and leave its others no level of int8."""
        with torch.no_grad():
            self.third.weight[:, 7] = 1000
        return self


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    store = Store(tmp_path_factory.mktemp("data"))
    make = lambda work: datasets.prepare(work, Data.parse("digits"), SIZE, Path())  # noqa: E731
    return store.produce("data", "digits", make, config={}, inputs={})


@pytest.fixture(scope="module")
def network(data: Artifact) -> Residual:
    """Trained for a few epochs: above 90 %."""
    torch.manual_seed(0)
    network, train = Residual(), datasets.load(data, "train")
    images, labels = torch.tensor(train.images).float() / 127.5 - 1, torch.tensor(train.labels)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(6):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return network


def exported(network: nn.Module, folder: Path) -> Artifact:
    """A network as the toolkit exports it."""
    wrapped = export._WithPreprocessing(network.eval(), [0.5] * 3, [0.5] * 3).eval()
    torch.onnx.export(
        wrapped,
        (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8),),
        str(folder / "model.onnx"),
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=export.OPSET,
        dynamo=False,
    )
    meta = {"input": {"name": "images", "shape": [3, SIZE, SIZE]}, "batch": "dynamic"}
    return Artifact("export", "key", folder, "digest", meta, {}, False, 0.0, "")


@pytest.fixture
def make(data: Artifact, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Quantises a network; returns what the stage says, and the graph."""

    def make(network: nn.Module, precision: Any, spelling: Any, allowed: float | None = None, **more: Any) -> Any:
        out = tmp_path / "out"
        out.mkdir()
        images = more.get("data", data)
        meta = quantize(Work(out, out), images, exported(network, tmp_path), precision, spelling, 128, allowed)
        return meta, out / "model.onnx"

    return make


def accuracy(path: Path, data: Artifact) -> float:
    val = datasets.load(data, "val")
    (logits,) = graphs.run_onnx(path.read_bytes(), np.array(val.images))
    return graphs.top1(val.labels, logits)


@pytest.fixture
def calibrated(network: Residual, data: Artifact, tmp_path: Path) -> tuple[onnx.ModelProto, Ranges]:
    model = calibration.prepare(exported(network, tmp_path).file("model.onnx"))
    return model, calibration.calibrate(model, datasets.load_images(data, "train")[:64], 32)["minmax"]


def constants(model: onnx.ModelProto) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def pairs(model: onnx.ModelProto) -> dict[str, tuple[float, int]]:
    """Scale and zero point of each activation that is quantised."""
    known = constants(model)
    return {
        node.input[0]: tuple(numpy_helper.to_array(known[name]).item() for name in node.input[1:])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in known
    }


# --- calibration -------------------------------------------------------------------------------------------


def test_ranges_are_those_of_the_training_images(calibrated: Any, network: Residual, data: Artifact) -> None:
    model, ranges = calibrated
    images = torch.tensor(datasets.load_images(data, "train")[:64]).float() / 127.5 - 1
    with torch.no_grad():
        first = network.first(images)
    (convolution, *_) = (node for node in model.graph.node if node.op_type == "Conv")
    assert ranges[convolution.output[0]] == pytest.approx((first.min().item(), first.max().item()), rel=1e-4)


def test_all_spellings_have_the_same_ranges(calibrated: tuple[onnx.ModelProto, Ranges]) -> None:
    model, ranges = calibrated
    signed, unsigned = (pairs(spell(model, ranges, name, "int8")) for name in ("tensorrt", "onnxruntime"))
    assert len(signed) == 4  # what the convolutions and fc read; the shortcut is one of them
    assert set(signed) < set(unsigned)
    for name, (scale, zero) in signed.items():
        low, high = ranges[name]
        assert (scale, zero) == (pytest.approx(max(-low, high) / 127), 0)
        assert unsigned[name][0] == pytest.approx((max(high, 0) - min(low, 0)) / 255)


def test_least_error_clips_outliers_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    even = random.uniform(-1, 1, 20_000).astype(np.float32)
    assert calibration._least_error(even, -1, 1) == pytest.approx((-1, 1), abs=0.02)
    outlier = np.append(random.normal(0, 0.1, 500_000), 3).astype(np.float32)
    low, high = calibration._least_error(outlier, -3, 3)
    assert -low == high < 2
    assert calibration._least_error(np.zeros(10, np.float32), 0, 0) == (0, 0)


# --- spelling ----------------------------------------------------------------------------------------------


def test_onnx_runtime_stays_in_int8(calibrated: tuple[onnx.ModelProto, Ranges], tmp_path: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    spelled = spell(*calibrated, "onnxruntime", "int8").SerializeToString()
    session = onnxruntime.InferenceSession(spelled, options, providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": np.zeros((1, 3, SIZE, SIZE), np.uint8)})[0].shape == (1, 10)
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("QLinearConv") == 3
    assert {"QGemm", "QLinearAdd"} <= set(kinds)
    assert not {"Conv", "Gemm", "Add"} & set(kinds)


def test_openvino_computes_what_the_graph_says(
    calibrated: tuple[onnx.ModelProto, Ranges], data: Artifact, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    spelled = spell(*calibrated, "onnxruntime", "int8")
    onnx.save(spelled, tmp_path / "spelled.onnx")
    images = np.array(datasets.load_images(data, "val")[:32])
    compiled = openvino.Core().compile_model(str(tmp_path / "spelled.onnx"), "CPU")
    layers = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    types = [info["runtimePrecision"].value for info in layers if info["layerType"].value == "Convolution"]
    assert set(types) <= {"u8", "i8"}
    assert len(types) == 3
    (expected,) = graphs.run_onnx(spelled.SerializeToString(), images)
    assert graphs.difference(expected, compiled(images)[0])["max_relative"] < 0.1


def test_tensorrt_can_fuse_a_product_with_its_addition(calibrated: tuple[onnx.ModelProto, Ranges]) -> None:
    spelled = spell(*calibrated, "tensorrt", "int8")
    made = {name: node for node in spelled.graph.node for name in node.output}
    (addition,) = (node for node in spelled.graph.node if node.op_type == "Add")
    assert sorted(made[name].op_type for name in addition.input) == ["Conv", "DequantizeLinear"]
    known = constants(spelled)
    for node in spelled.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = known[node.input[2]]
            assert zero.data_type == TensorProto.INT8
            assert not numpy_helper.to_array(zero).any()
        elif node.op_type in ("Conv", "Gemm"):
            assert [made[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
            assert known[node.input[2]].data_type == TensorProto.FLOAT
            assert known[made[node.input[1]].input[1]].dims == known[node.input[2]].dims, "a scale a channel"


def test_weights_of_nothing_but_zeros_have_a_scale(network: Residual, tmp_path: Path) -> None:
    empty = Residual()
    nn.init.zeros_(empty.third.weight)
    model = calibration.prepare(exported(empty, tmp_path).file("model.onnx"))
    images = np.zeros((8, 3, SIZE, SIZE), np.uint8)
    spelled = spell(model, calibration.calibrate(model, images, 8)["minmax"], "tensorrt", "int8")
    scales = [numpy_helper.to_array(t) for name, t in constants(spelled).items() if name.endswith("_scale")]
    assert scales
    assert all((scale > 0).all() for scale in scales)


def test_fp8_has_the_graph_in_an_opset_that_knows_it(calibrated: tuple[onnx.ModelProto, Ranges]) -> None:
    model, ranges = calibrated
    spelled = spell(model, ranges, "tensorrt", "fp8")
    onnx.checker.check_model(spelled, full_check=True)
    assert [entry.version for entry in spelled.opset_import if not entry.domain] == [19]
    assert [entry.version for entry in model.opset_import if not entry.domain] == [export.OPSET]
    scale, _ = pairs(spelled)[next(iter(pairs(spelled)))]
    assert scale == pytest.approx(1 / 448, rel=0.02)  # of pixels between -1 and 1


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_kept_is_read_as_it_is(calibrated: tuple[onnx.ModelProto, Ranges], spelling: Any) -> None:
    model, ranges = calibrated
    spelled = spell(model, ranges, spelling, "int8", {"/network/second/Conv"})
    assert "/network/second/Conv" not in quantised(spelled)
    assert {"/network/first/Conv", "/network/third/Conv"} <= set(quantised(spelled))
    (kept,) = (node for node in spelled.graph.node if node.name == "/network/second/Conv")
    assert kept.input[1] in constants(spelled)


# --- accuracy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "spelling"),
    [("int8", "onnxruntime"), ("int8", "tensorrt"), ("fp8", "tensorrt"), ("fp16", "tensorrt")],
)
def test_accuracy_survives(make: Any, network: Residual, data: Artifact, precision: str, spelling: str) -> None:
    meta, path = make(network, precision, spelling, 0.02)
    before = accuracy(path.parents[1] / "model.onnx", data)
    assert before > 0.9
    assert meta["drop"] == pytest.approx(before - accuracy(path, data))
    assert meta["drop"] <= 0.02
    assert meta["kept"] == []
    assert meta["method"] == ("cast" if precision == "fp16" else "ptq")
    assert meta["calibration_images"] == (0 if precision == "fp16" else 128)
    assert set(graphs.precisions(path).values()) == {precision}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_layer_that_int8_breaks_is_kept_in_fp32(
    make: Any, network: Residual, data: Artifact, spelling: str
) -> None:
    broken = Residual()
    broken.load_state_dict(network.state_dict())
    meta, path = make(broken.break_int8(), "int8", spelling, 0.02)
    assert meta["drop"] <= 0.02
    (kept,) = meta["kept"]
    assert (kept["node"], kept["precision"]) == ("/network/third/Conv", "fp32")
    assert "alone in int8 it puts the logits" in kept["why"]
    assert meta["drop"] == pytest.approx(accuracy(path.parents[1] / "model.onnx", data) - accuracy(path, data))
    found = graphs.precisions(path)
    assert found.pop("/network/third/Conv") == "fp32"
    assert set(found.values()) == {"int8"}


def test_the_ranges_that_lose_least_are_taken(
    make: Any, network: Residual, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = calibration.calibrate

    def calibrate(*arguments: Any) -> dict[str, Ranges]:
        ranges = real(*arguments)["minmax"]
        narrow = {name: (low / 50, high / 50) for name, (low, high) in ranges.items()}
        return {"narrow": narrow, "whole": ranges, "narrower": narrow}

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    meta, _ = make(network, "int8", "tensorrt")
    assert meta["calibration"] == "whole"
    assert meta["drop"] <= 0.02


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_half_of_the_contracts_drop_is_for_int8(tmp_path: Path, runtime: Any) -> None:
    """Both runtimes of a CPU ask for the same graph."""
    asked = SimpleNamespace(make=lambda name, config, inputs, make, amount: config)
    job = job_of(tmp_path, precision="int8", target=files.load_target("host-cpu").using(runtime))
    profile = job.profile
    assert profile.contract.max_accuracy_drop
    assert networks.quantize(job, asked, None, networks.Teacher(), None, None, None) == {  # type: ignore[arg-type]
        "precision": "int8",
        "spelling": "onnxruntime",
        "images": profile.calibration_images,
        "allowed": profile.contract.max_accuracy_drop / 2,
    }


def test_nothing_is_kept_unless_a_drop_is_named(make: Any, network: Residual) -> None:
    broken = Residual()
    broken.load_state_dict(network.state_dict())
    meta, _ = make(broken.break_int8(), "int8", "tensorrt")
    assert meta["drop"] > 0.1
    assert (meta["kept"], meta["allowed"]) == ([], None)


def test_without_labels_there_is_no_drop(make: Any, network: Residual, tmp_path: Path) -> None:
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (32, 3, SIZE, SIZE), np.uint8)
    np.save(folder / "train.images.npy", images)
    unlabelled = Artifact("data", "key", folder, "digest", {"classes": []}, {}, False, 0.0, "")
    meta, _ = make(network, "int8", "tensorrt", 0.01, data=unlabelled)
    assert (meta["drop"], meta["kept"]) == (None, [])
    assert meta["calibration"] in ("minmax", "mse")


def test_a_graph_without_products_is_refused(make: Any) -> None:
    class Pixels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    with pytest.raises(StageError, match="no layer of the graph can be quantised to int8") as error:
        make(Pixels(), "int8", "tensorrt")
    assert error.value.hint == "use --precision fp32 or fp16 for this network"
