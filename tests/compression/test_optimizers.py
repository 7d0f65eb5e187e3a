from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from toolkit.compression import models
from toolkit.compression.optimizers import Optimizer, orthogonal
from toolkit.config import Recipe
from toolkit.workload import Model

RECIPE = Recipe(batch=128, optimizer="muon", momentum=0.9, weight_decay=1e-3)


class Layers(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(3, 8, 3)
        self.tall = nn.Conv2d(8, 24, 1)
        self.wide = nn.Conv2d(24, 8, 3, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.derived = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.derived(self.grouped(self.wide(self.tall(self.pixels(x))))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


HIDDEN = {"tall.weight", "wide.weight"}


def with_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


def stepped(network: nn.Module, recipe: Recipe, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    network = copy.deepcopy(network)
    optimizer = Optimizer(network, recipe, dtype, 32)
    assert optimizer.notes == []
    for seed in range(3):
        with_gradients(network, seed)
        optimizer.step(0.2 - 0.05 * seed)
    return network.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_take_the_steps_of_pytorchs_muon(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Which has no weight decay here, and whose steps are not a share of the weights' length."""
    network = Layers().to(memory_format=layout)
    result = copy.deepcopy(network)
    ours = Optimizer(result, RECIPE.model_copy(update={"weight_decay": 0.0}), dtype, 32)
    reference = {name: nn.Parameter(network.get_parameter(name).detach().flatten(1).clone()) for name in HIDDEN}
    theirs = torch.optim.Muon(reference.values(), lr=1.0, weight_decay=0.0, momentum=0.9, ns_steps=3)
    for seed, rate in enumerate((0.3, 0.2, 0.1)):
        with_gradients(result, seed)
        before = {name: matrix.detach().clone() for name, matrix in reference.items()}
        for name, matrix in reference.items():
            gradient = result.get_parameter(name).grad
            assert gradient is not None
            matrix.grad = gradient.flatten(1)
        theirs.step()
        ours.step(rate)
        for name, matrix in reference.items():
            step = matrix.detach() - before[name]
            matrix.data = before[name] + 0.1 * rate * before[name].norm() * step / step.norm()
    for name, matrix in reference.items():
        assert (matrix - network.get_parameter(name).flatten(1)).abs().max() > 5e-3
        torch.testing.assert_close(result.get_parameter(name).flatten(1), matrix, rtol=0, atol=5e-4)


def test_a_step_takes_weight_decay_as_sgd_does_and_leaves_zeros() -> None:
    network = Layers()
    nn.init.zeros_(network.wide.weight)
    before = network.tall.weight.detach().clone()
    with_gradients(network, 1)
    network.tall.weight.grad = torch.zeros_like(before)
    Optimizer(network, RECIPE, torch.float32, 32).step(0.2)
    torch.testing.assert_close(network.tall.weight.detach(), before * (1 - 0.2 * RECIPE.weight_decay))
    assert network.wide.weight.norm() > 0


def test_everything_else_takes_the_steps_of_sgd() -> None:
    network = Layers()
    muon, sgd = stepped(network, RECIPE), stepped(network, RECIPE.model_copy(update={"optimizer": "sgd"}))
    assert {name for name in muon if not torch.equal(muon[name], sgd[name])} == HIDDEN


def test_singular_values_come_near_one() -> None:
    matrices = torch.randn(3, 16, 144) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    for some in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonal(some))
        assert values.min() > 0.5
        assert values.max() < 1.3
    assert orthogonal(torch.zeros(1, 4, 4)).abs().max() == 0, "a layer without gradients stays where it is"


def test_muon_is_left_out_where_it_costs_more_than_it_saves() -> None:
    wide = models.build(Model.parse("torchvision:resnet18"), 10, seed=0)
    small = Optimizer(wide, RECIPE, torch.float32, 32)
    assert len(small.notes) == 1
    assert "to the arithmetic of a step: the optimizer is SGD" in small.notes[0]
    assert small.state_dict()["muon"] == []
    large = Optimizer(wide, RECIPE, torch.float32, 224)
    assert large.notes == []
    assert len(large.state_dict()["muon"]) == 19, "all convolutions but the first"
    assert Optimizer(wide, RECIPE.model_copy(update={"optimizer": "sgd"}), torch.float32, 32).notes == []
