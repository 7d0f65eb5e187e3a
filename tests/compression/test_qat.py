"""Quantisation-aware training: rounds like the graph, regains what int8 lost, and is taken only when it does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from tests.compression.test_quantization import SIZE, SPELLINGS, accuracy, exported
from tests.conftest import job_of
from toolkit import export, graphs, networks
from toolkit.compression import calibration, models, qat
from toolkit.compression import data as datasets
from toolkit.compression.quantization import Retrain, quantize
from toolkit.compression.spelling import Levels, input_levels, spell
from toolkit.config import Recipe
from toolkit.report import terminal
from toolkit.store import Artifact, Progress, Store, Work
from toolkit.workload import Data, Model

RECIPE = Recipe(batch=32, lr=0.1, flip=False, crop=0, qat_epochs=4)


class Chain(nn.Module):
    """A small classifier without branches."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, 8, 3, stride, 1, bias=False) for channels, stride in ((3, 1), (8, 2), (8, 2))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in self.convolutions)
        self.fc = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = torch.relu(norm(convolution(x)))
        out: Tensor = self.fc(x.flatten(1))
        return out


def build(num_classes: int) -> nn.Module:
    """A model as a user has one."""
    return Chain()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    store = Store(tmp_path_factory.mktemp("data"))
    make = lambda work: datasets.prepare(work, Data.parse("digits"), SIZE, Path())  # noqa: E731
    found = store.produce("data", "digits", make, config={}, inputs={})
    found.meta.update(mean=[0.5] * 3, std=[0.5] * 3)  # as `exported` has them
    return found


@pytest.fixture(scope="module")
def good(data: Artifact) -> Chain:
    """Trained for a few epochs, to above 90 %."""
    torch.manual_seed(0)
    network, train = Chain(), datasets.load(data, "train")
    images, labels = torch.tensor(train.images).float() / 127.5 - 1, torch.tensor(train.labels)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(6):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return network.eval()


def unbalanced(network: Chain, factor: float) -> Chain:
    """The same function in fp32; its weights for one channel leave the others few of int8's levels."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for norm, after in zip(network.norms, [*network.convolutions[1:], network.fc], strict=True):
            norm.weight[0] /= factor
            norm.bias[0] /= factor
            after.weight[:, : 1 if after is not network.fc else 16] *= factor
    return network


Quantise = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture
def make(data: Artifact, tmp_path: Path) -> Quantise:
    """Quantises a network with what it is retrained to, if it is; returns what the stage says, and the graph."""

    def make(network: nn.Module, retrain: Retrain | None, allowed: float | None = 0.0, **more: Any) -> Any:
        out, resume = tmp_path / "out", tmp_path / "resume"
        out.mkdir()
        resume.mkdir()
        source = exported(network, tmp_path)
        spelling = more.pop("spelling", "onnxruntime")
        meta = quantize(Work(out, resume), data, source, "int8", spelling, 128, allowed, retrain, **more)
        return meta, out / "model.onnx"

    return make


def retraining(network: nn.Module, data: Artifact, recipe: Recipe = RECIPE) -> Retrain:
    """Quantisation-aware training of a copy of the network, which is its own teacher."""

    def retrain(work: Work, levels: Mapping[str, Levels]) -> tuple[Path, dict[str, Any]]:
        student = copy.deepcopy(network)
        by_module = export.by_module(student, levels)
        fitted = qat.train(work, data, student, by_module, recipe, 0, copy.deepcopy(network))
        return exported(student, work.resume).file("model.onnx"), asdict(fitted)

    return retrain


def becoming(network: nn.Module) -> Retrain:
    """A training that ends with this network."""

    def retrain(work: Work, levels: Mapping[str, Levels]) -> tuple[Path, dict[str, Any]]:
        return exported(network, work.resume).file("model.onnx"), {"history": [{}, {}], "notes": ["little memory"]}

    return retrain


def never(work: Work, levels: Mapping[str, Levels]) -> tuple[Path, dict[str, Any]]:
    raise AssertionError("nothing has to be trained")


def test_pytorch_rounds_as_the_graph_does(good: Chain, data: Artifact, tmp_path: Path) -> None:
    model = calibration.prepare(exported(good, tmp_path).file("model.onnx"))
    ranges = calibration.calibrate(model, datasets.load_images(data, "train")[:64], 32)["minmax"]
    spelled = spell(model, ranges, "tensorrt", "int8")
    levels = export.by_module(good, input_levels(spelled))
    assert sorted(levels) == ["convolutions.0", "convolutions.1", "convolutions.2", "fc"]
    images = np.array(datasets.load_images(data, "val"))
    (in_int8,) = graphs.run_onnx(spelled.SerializeToString(), images)
    inputs, network = torch.tensor(images).float() / 127.5 - 1, copy.deepcopy(good)
    with torch.no_grad():
        with qat.rounded(network, levels):
            in_pytorch = network(inputs).numpy()
        in_fp32 = network(inputs).numpy()
        np.testing.assert_array_equal(in_fp32, good(inputs).numpy(), "nothing of it is left")
    assert np.abs(in_pytorch - in_int8).mean() < np.abs(in_fp32 - in_int8).mean() / 100


def test_an_input_of_any_zero_point_has_the_graphs_levels(good: Chain, data: Artifact, tmp_path: Path) -> None:
    model = calibration.prepare(exported(good, tmp_path).file("model.onnx"))
    ranges = calibration.calibrate(model, datasets.load_images(data, "train")[:64], 32)["minmax"]
    levels = export.by_module(good, input_levels(spell(model, ranges, "onnxruntime", "int8")))
    assert levels["convolutions.0"] == Levels(pytest.approx(2 / 255, rel=0.01), 128, 0)
    assert (levels["fc"].zero, levels["fc"].lowest) == (0, 0), "after a ReLU"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_int8_lost_is_regained(make: Quantise, good: Chain, data: Artifact, spelling: str) -> None:
    network = unbalanced(good, 120)
    meta, path = make(network, retraining(network, data), None, spelling=spelling, always=True)
    told = meta["qat"]
    assert told["before"] > 0.03
    assert told["after"] < told["before"] / 2
    assert (told["taken"], told["epochs"], meta["method"]) == (True, RECIPE.qat_epochs, "qat")
    before = accuracy(path.parents[1] / "model.onnx", data)
    assert meta["drop"] == told["after"] == pytest.approx(before - accuracy(path, data))


def test_where_layers_in_fp32_do_not_suffice_it_is_trained(make: Quantise, good: Chain, data: Artifact) -> None:
    meta, path = make(unbalanced(good, 1000), becoming(good), 0.01, spelling="tensorrt")
    assert meta["qat"]["before"] > 0.1
    assert (meta["method"], meta["qat"]["taken"], meta["kept"]) == ("qat", True, [])
    assert meta["qat"]["epochs"] == 2
    assert meta["drop"] == meta["qat"]["after"] <= 0.01
    assert accuracy(path, data) > 0.9
    said = terminal.describe("quantize", meta)
    assert f"after 2 epochs of quantisation-aware training (before: loses {meta['qat']['before']:.2%})" in said


def test_what_loses_little_is_not_trained(make: Quantise, good: Chain) -> None:
    meta, _ = make(good, never, 0.05)
    assert (meta["method"], meta["qat"], meta["notes"]) == ("ptq", None, [])


def test_what_is_no_better_is_not_taken(make: Quantise, good: Chain, data: Artifact) -> None:
    meta, path = make(good, becoming(Chain()), 0.05, always=True)
    assert (meta["method"], meta["qat"]["taken"], meta["drop"]) == ("ptq", False, meta["qat"]["before"])
    assert meta["qat"]["after"] > 0.5
    assert accuracy(path, data) > 0.9
    assert meta["notes"] == ["little memory"]
    assert "no better after 2 epochs of quantisation-aware training" in terminal.describe("quantize", meta)


def test_an_interrupted_training_continues_to_the_same_weights(data: Artifact, good: Chain, tmp_path: Path) -> None:
    levels = {"convolutions.1": Levels(0.02, 0, 0), "fc": Levels(0.03, -128, -128)}
    recipe = RECIPE.model_copy(update={"qat_epochs": 2, "train_images": 128})
    told: list[str] = []

    def train(folder: Path, progress: Progress) -> dict[str, Tensor]:
        folder.mkdir(exist_ok=True)
        network = copy.deepcopy(good)
        qat.train(Work(folder, folder, progress), data, network, levels, recipe, 0)
        return network.state_dict()

    def stop(done: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", stop)
    continued = train(tmp_path / "broken", lambda done, total, text: told.append(text))
    assert told[0] == "for int8: continues after epoch 1"
    whole = train(tmp_path / "whole", lambda done, total, text: None)
    assert continued.keys() == whole.keys() == good.state_dict().keys()
    assert all(torch.equal(continued[key], whole[key]) for key in whole)
    changed = {key for key, value in good.state_dict().items() if not torch.equal(value, whole[key])}
    assert {"convolutions.1.weight", "norms.1.weight"} <= changed
    assert not any("running" in key for key in changed), "batch norm keeps its statistics"


def test_the_tuned_network_is_trained_and_exported_again(data: Artifact, good: Chain, tmp_path: Path) -> None:
    """From what the stage is asked to what it tells, with a network as fine-tuning leaves it."""
    source = exported(good, tmp_path)
    models.save(copy.deepcopy(good), tmp_path / "model.pth")
    save_file(good.state_dict(), tmp_path / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    told: list[str] = []
    work = Work(out, tmp_path, lambda done, total, text: told.append(text))
    asked = SimpleNamespace(make=lambda name, config, inputs, make, amount: (config, inputs, make(work)))
    recipe = RECIPE.model_dump() | {"qat": "always", "qat_epochs": 1, "train_images": 64}
    job = job_of(tmp_path, precision="int8", model=Model.parse(f"{__name__}:build"), seed=0).trained_by(**recipe)
    config, inputs, meta = networks.quantize(  # type: ignore[misc]
        job,
        asked,
        data,
        networks.Teacher(),
        source,
        source,
        source,  # type: ignore[arg-type]
    )
    assert config["recipe"]["qat"] == "always"
    assert set(inputs) == {"data", "exported", "baseline", "tuned"}
    assert meta["qat"]["epochs"] == 1
    assert any(text.startswith("for int8: loss ") for text in told)
    before, after = (onnx.load(path) for path in (source.file("model.onnx"), tmp_path / "retrained.onnx"))
    assert [node.name for node in before.graph.node] == [node.name for node in after.graph.node]
    assert [entry.key for entry in after.metadata_props] == ["weights_sha256"]
    images = np.array(datasets.load_images(data, "val"))
    logits = [graphs.run_onnx(model.SerializeToString(), images)[0] for model in (before, after)]
    assert 0 < np.abs(logits[0] - logits[1]).max() < np.abs(logits[0]).max() / 4


def test_by_module(tmp_path: Path) -> None:
    """The nodes of every convolution and linear layer of a network with containers find their modules."""
    network = models.build(Model.parse("resnet20"), 10, seed=0)
    graph = onnx.load(exported(network, tmp_path).file("model.onnx")).graph
    nodes = {node.name: node.name for node in graph.node if node.op_type in ("Conv", "Gemm")}
    layers = [name for name, layer in network.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert sorted(export.by_module(network, nodes)) == sorted(layers)
