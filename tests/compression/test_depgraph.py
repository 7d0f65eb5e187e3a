from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from toolkit.compression import data as datasets
from toolkit.compression import depgraph, flops, models, pruning, training
from toolkit.compression.data import Split
from toolkit.compression.images import Hardware, Images
from toolkit.config import Flops, PrunerName, Recipe
from toolkit.errors import UsageError
from toolkit.store import Artifact, Store, Work
from toolkit.workload import Data, Model

META = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def images(count: int, size: int) -> Images:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return Images(Split(pixels, random.integers(0, 10, count)), META, Hardware.find())


def searched(network: nn.Module, folder: Path, size: int, limit: float, divisor: int) -> nn.Module:
    return depgraph.search(
        network,
        images(65, size),  # the last batch is of one image
        images(32, size),
        size=size,
        limit=limit,
        divisor=divisor,
        recipe=Recipe(),
        hardware=Hardware.find(),
        work=Work(folder, folder),
        shared=folder / "shared",
    )


@pytest.mark.parametrize(
    ("name", "size", "divisor", "budget"),
    [
        ("resnet20", 32, 8, 0.5),
        ("torchvision:resnet18", 32, 16, 0.4),
        ("torchvision:mobilenet_v2", 32, 8, 0.5),
        ("torchvision:mobilenet_v3_small", 32, 8, 0.5),
    ],
)
def test_a_pruned_network_keeps_the_budget_is_restored_and_exported(
    tmp_path: Path, name: str, size: int, divisor: int, budget: float
) -> None:
    model = Model.parse(name)
    network = models.build(model, 10, seed=0)
    before = {key: layer.weight.shape[0] for key, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
    limit = budget * flops.flops(network, size)
    pruned = searched(network, tmp_path, size, limit, divisor).eval()
    assert 0.95 * limit < flops.flops(pruned, size) <= limit
    for key, layer in pruned.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.out_channels == layer.weight.shape[0]
            assert layer.out_channels in (before[key], layer.out_channels // divisor * divisor)

    models.save(pruned, tmp_path / "model.pth")
    restored = models.restore(model, 10, tmp_path / "model.pth").eval()
    inputs = torch.randn(4, 3, size, size)
    with torch.no_grad():
        expected = pruned(inputs)
        torch.testing.assert_close(restored(inputs), expected)
    assert [layer.extra_repr() for layer in restored.modules()] == [
        layer.extra_repr() for layer in pruned.modules()
    ]

    torch.onnx.export(
        restored, (inputs,), tmp_path / "model.onnx", dynamo=False, opset_version=17, input_names=["x"]
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {"x": inputs.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["resnet20", "torchvision:resnet18", "torchvision:mobilenet_v3_small"])
def test_what_is_removed_together_belongs_together(name: str) -> None:
    """Channels that are zero wherever they are computed can go, and nothing else is computed."""
    torch.manual_seed(0)
    network = models.build(Model.parse(name), 10, seed=0).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    graph = depgraph._graph(network, 32)
    groups, _ = depgraph._groups(network, graph, 8)
    orders = [torch.randperm(group.size).tolist() for group in groups]
    with torch.no_grad():
        for group, order in zip(groups, orders, strict=True):
            group.kept = group.fewer(8)
            gone = set(order[: group.size - group.kept])
            for item in group.group:
                layer = item.dep.target.module
                rows = [at for at, root in zip(item.idxs, item.root_idxs, strict=True) if root in gone]
                if graph.is_out_channel_pruning_fn(item.dep.handler) and isinstance(layer, nn.Module):
                    for parameter in layer.parameters():
                        parameter[rows] = 0
    inputs = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = network(inputs)
        assert expected.std() > 0.001
        before = models.parameters(network)
        depgraph._remove(graph, groups, orders)
        torch.testing.assert_close(network(inputs), expected, atol=1e-4, rtol=1e-3)
    assert models.parameters(network) < before


class Mixed(nn.Module):
    """A grouped convolution, a parameter that is no layer's, and a convolution that can shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.scaled = nn.Conv2d(32, 32, 1)
        self.scale = nn.Parameter(torch.ones(32, 1, 1))
        self.free = nn.Conv2d(32, 64, 3, padding=1)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.scaled(self.grouped(self.first(x))) * self.scale
        logits: Tensor = self.fc(self.free(out).mean((2, 3)))
        return logits


def test_layers_that_stay_are_named_with_their_share_of_the_flops() -> None:
    found = pruning.reach(Mixed(), "mixed", 16, 8, "depgraph")
    assert list(found.skipped) == ["first", "grouped", "scaled"]
    assert "grouped Conv2d" in found.skipped["first"]
    assert "parameter" in found.skipped["scaled"]
    kept = 2 * 16 * 16 * (3 * 9 * 32 + 32 * 8 * 9 + 32 * 32)
    assert found.unprunable == pytest.approx(kept / found.flops, abs=0.005)
    assert found.smallest == pytest.approx(kept + 2 * 16 * 16 * 32 * 9 * 8, rel=0.01)


@pytest.mark.parametrize("pruner", ["fastnas", "depgraph"])
def test_zero_padded_shortcuts_stay_with_both_pruners(pruner: PrunerName) -> None:
    found = pruning.reach(models.build(Model.parse("resnet20"), 10, seed=0), "resnet20", 32, 16, pruner)
    assert found.smallest / found.flops == pytest.approx(0.6, abs=0.005)
    first = [f"layer1.{block}.conv{number}" for block in range(3) for number in (1, 2)]
    assert list(found.skipped) == ["conv1", *first, "fc"]
    assert "16 channels, and the channel divisor is 16" in found.skipped["layer1.0.conv1"]
    assert 0.3 < found.unprunable < 0.4


def test_a_network_that_depgraph_cannot_follow_is_told_so() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)
            self.fc = nn.Linear(16 * 14 * 14, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.conv(x).reshape(len(x), 16 * 14 * 14))
            return logits

    with pytest.raises(UsageError, match="DepGraph cannot prune the model 'flat'") as error:
        pruning.reach(Flat(), "flat", 16, 8, "depgraph")
    assert "--pruner fastnas" in str(error.value.hint)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.delitem(sys.modules, "toolkit.compression.depgraph")
    monkeypatch.delattr("toolkit.compression.depgraph")
    with pytest.raises(
        UsageError, match="'depgraph' needs a package that is not installed: torch_pruning"
    ) as error:
        pruning.reach(Mixed(), "any", 8, 8, "depgraph")
    assert "pip install -e '.[depgraph]'" in str(error.value.hint)


def test_from_a_checkpoint_and_a_teacher_to_a_tuned_network(tmp_path: Path) -> None:
    def made(stage: str, make: Callable[[Work], dict[str, Any]]) -> Artifact:
        store = Store(tmp_path / "store")
        return store.produce(stage, stage, make, config={}, inputs={}, fast=False)

    model = Model.parse("resnet20")
    torch.save(models.build(model, 10, seed=5).state_dict(), tmp_path / "teacher.pt")
    teacher = Model.parse_teacher(f"resnet20={tmp_path / 'teacher.pt'}")
    recipe = Recipe(epochs=1, finetune_epochs=1, train_images=64, val_images=64)
    data = made("data", lambda work: datasets.prepare(work, Data.parse("digits"), 16, tmp_path))
    checked = made("check", lambda work: pruning.check(data, model, 8, "depgraph", tmp_path, teacher))
    assert 0.3 < checked.meta["smallest"] / checked.meta["flops"] < 0.32
    alone = made("alone", lambda work: training.train(work, data, model, recipe, 1))
    baseline = made("train", lambda work: training.train(work, data, model, recipe, 1, teacher=teacher))
    assert baseline.meta["history"] != alone.meta["history"], "the teacher has taught nothing"
    pruned = made(
        "prune",
        lambda work: pruning.prune(
            work, data, model, baseline, recipe, Flops.parse("50%"), 8, "depgraph", tmp_path, 1
        ),
    )
    assert pruned.meta["pruner"] == "depgraph"
    assert pruned.meta["flops"] <= 0.5 * baseline.meta["flops"]
    tuned = made(
        "finetune", lambda work: training.finetune(work, data, model, baseline, pruned, recipe, 1, teacher=teacher)
    )
    assert tuned.meta["flops"] == pruned.meta["flops"]
    by_itself = made("by_itself", lambda work: training.finetune(work, data, model, baseline, pruned, recipe, 1))
    assert by_itself.meta["history"] != tuned.meta["history"]
    labels = recipe.model_copy(update={"teacher": False})
    untaught = made("untaught", lambda work: training.finetune(work, data, model, baseline, pruned, labels, 1))
    assert untaught.meta["history"] != by_itself.meta["history"], "without a teacher, the unpruned network teaches"
    long = recipe.model_copy(update={"epochs": 10})
    gently = made("gently", lambda work: training.finetune(work, data, model, baseline, pruned, long, 1))
    first, other = (
        torch.cat([parameter.flatten() for parameter in models.restore(model, 10, file).parameters()])
        for file in (by_itself.file("model.pth"), gently.file("model.pth"))
    )
    assert not torch.equal(first, other), "its learning rate depends on training's length"
