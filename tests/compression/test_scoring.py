from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from toolkit.compression import batchnorm, fastnas, flops, models, scoring
from toolkit.compression.data import Split
from toolkit.compression.images import Hardware, Images, accuracy, predict
from toolkit.config import Recipe
from toolkit.store import Work
from toolkit.workload import Model

META = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
SIZE = 16
RECIPE = Recipe(crop=1, cutout=2)


def images(count: int, hardware: Hardware, labels: np.ndarray[Any, Any] | None = None) -> Images:
    coarse = np.random.default_rng(count).integers(0, 256, (count, 3, 4, 4), np.uint8)
    pixels = coarse.repeat(SIZE // 4, 2).repeat(SIZE // 4, 3)
    return Images(Split(pixels, np.zeros(count, np.int64) if labels is None else labels), META, hardware)


def knowing(network: nn.Module, hardware: Hardware) -> tuple[nn.Module, Images]:
    """Return a network, and images that it tells apart: they are labelled as it says."""
    some = images(200, hardware)
    batchnorm.recalibrate(network, batchnorm.calibration(some, RECIPE))  # what training would have done
    with torch.no_grad():
        logits = predict(network, some)
        last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
        last.bias -= logits.mean(0)
        logits = predict(network, some)
    return network, images(200, hardware, logits.argmax(1).numpy())


Found = tuple[dict[str, Any], list[torch.Size], int]  # the sensitivity map, and the network's widths and FLOPs


def outcome(checkpoint: Path, pruned: nn.Module) -> Found:
    found = torch.load(checkpoint, weights_only=True)
    shapes = [parameter.shape for parameter in pruned.parameters()]
    return found["sensitivity_map"], shapes, flops.flops(pruned, SIZE)


def search(network: nn.Module, val: Images, folder: Path, hardware: Hardware, divisor: int, limit: float) -> Found:
    """Return what a search comes to."""
    (folder / "resume").mkdir(parents=True, exist_ok=True)
    pruned = fastnas.search(
        network,
        images(400, hardware),
        val,
        size=SIZE,
        limit=limit * flops.flops(network, SIZE),
        divisor=divisor,
        recipe=RECIPE,
        hardware=hardware,
        work=Work(folder, folder / "resume"),
        shared=folder / "shared",
    )
    return outcome(folder / "shared.pth", pruned)


def plain_search(
    network: nn.Module, val: Images, folder: Path, hardware: Hardware, divisor: int, limit: float
) -> Found:
    """Return the same of a search as a tutorial writes it: Model Optimizer calibrates batch norm by itself."""
    import modelopt.torch.prune as mtp

    folder.mkdir()
    recipe = RECIPE.model_copy(update={"batch": 8})
    with hardware.autocast(), flops.counting():
        pruned, _ = mtp.prune(
            network,
            fastnas._mode(divisor),
            {"flops": limit * flops.flops(network, SIZE)},
            torch.zeros(1, 3, SIZE, SIZE),
            {
                "data_loader": list(
                    images(400, hardware).augmented(recipe, torch.Generator().manual_seed(0), SIZE)
                ),
                "collect_func": lambda batch: batch[0],
                "score_func": lambda candidate: accuracy(predict(candidate, val), val),
                "checkpoint": str(folder / "search.pth"),
            },
        )
    return outcome(folder / "search.pth", pruned)


@pytest.mark.parametrize(
    ("name", "divisor", "limit"),
    [("resnet20", 16, 0.7), ("torchvision:mobilenet_v3_small", 288, 0.8)],
)
def test_a_search_comes_to_the_same_as_a_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, divisor: int, limit: float
) -> None:
    hardware = Hardware.find()
    network, val = knowing(models.build(Model.parse(name), 10, seed=3), hardware)
    passes = 0
    run = scoring._Program.run

    def counted(*arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        return run(*arguments)

    monkeypatch.setattr(scoring._Program, "run", counted)
    ours = search(copy.deepcopy(network), val, tmp_path / "ours", hardware, divisor, limit)
    assert passes > 100, "the candidates were scored in pieces"
    plain = plain_search(network, val, tmp_path / "plain", hardware, divisor, limit)
    assert ours == plain
    assert len({value for scores in plain[0].values() for value in scores.values()}) > 5, "widths make a difference"


def wide() -> nn.Sequential:
    """Return layers that change what they get in place; FastNAS finds the width in the middle."""
    return nn.Sequential(
        nn.Conv2d(32, 48, 1, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(inplace=True),
        nn.Conv2d(48, 32, 1, bias=False),
    )


class Small(nn.Module):
    """Two blocks with shortcuts, whose results are added in place; the blocks may share a batch norm."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.one, self.two = wide(), wide()
        self.after_one = nn.BatchNorm2d(32)
        self.after_two = self.after_one if shared else nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x += self.after_one(self.one(x))
        out = self.after_two(self.two(x))
        x += out
        return self.fc(torch.relu_(x).mean((2, 3)))


@pytest.mark.parametrize(("shared", "kept_bytes"), [(False, 2e9), (False, 0), (True, 2e9)])
def test_scores_are_the_plain_ones_whatever_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool, kept_bytes: float
) -> None:
    monkeypatch.setattr(scoring, "_KEPT_BYTES", kept_bytes)
    hardware = Hardware.find()
    network, val = knowing(Small(shared=shared), hardware)
    ours = search(copy.deepcopy(network), val, tmp_path / "ours", hardware, 16, 0.7)
    assert ours == plain_search(network, val, tmp_path / "plain", hardware, 16, 0.7)
    assert shared or any(value > 0 for scores in ours[0].values() for value in scores.values())


def test_the_budget_is_kept_near_the_smallest_network_too(tmp_path: Path) -> None:
    hardware = Hardware.find()
    network, val = knowing(Small(shared=False), hardware)
    whole = flops.flops(network, SIZE)
    smallest, _ = fastnas.smallest(copy.deepcopy(network), "small", SIZE, 16)
    least = flops.flops(smallest, SIZE) / whole
    scores, _, _ = search(network, val, tmp_path, hardware, 16, 0.7)
    for share in (least, least + 0.02):
        again, _, count = search(network, val, tmp_path, hardware, 16, share)
        assert count <= share * whole
        assert again == scores, "what other budgets share is as it was measured"


def test_a_search_goes_on_where_it_was_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = Hardware.find()
    network, val = knowing(Small(shared=False), hardware)
    whole = search(copy.deepcopy(network), val, tmp_path / "whole", hardware, 16, 0.7)
    evaluated = 0

    class Stops(scoring.Scorer):
        def __call__(self, network: nn.Module) -> float:
            nonlocal evaluated
            evaluated += 1
            if evaluated == 4:
                raise KeyboardInterrupt
            return super().__call__(network)

    monkeypatch.setattr(fastnas, "Scorer", Stops)
    with pytest.raises(KeyboardInterrupt):
        search(copy.deepcopy(network), val, tmp_path / "broken", hardware, 16, 0.7)
    monkeypatch.undo()
    found = torch.load(tmp_path / "broken" / "resume" / "search.pth", weights_only=True)
    assert 0 < len(found["sensitivity_map"]) < len(whole[0])
    assert search(network, val, tmp_path / "broken", hardware, 16, 0.7) == whole
