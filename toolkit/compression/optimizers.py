"""What takes the steps of a training: SGD, or Muon for convolutions and SGD for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.compression import flops
from toolkit.config import Recipe

_RATE = 0.1  # Muon's learning rate, the length of a step as a share of the weights': this share of SGD's
_SHORTEST = 1e-3  # length that weights are taken for, so that zeros can be left
_ITERATIONS = 3
_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_WORTH = 0.25  # of the arithmetic of forward and backward pass; Muon saves more than that in epochs


class Optimizer:
    """Takes steps by the gradients that a network holds.

    Args:
        network: On the device that computes.
        recipe: Which optimizer, its momentum, its weight decay.
        dtype: What the hardware multiplies matrices in.
        size: Side of the images.

    Attributes:
        notes: What the user should know: nothing, or why it is not Muon.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, dtype: torch.dtype, size: int) -> None:
        filters = _hidden(network) if recipe.optimizer == "muon" else []
        self.notes: list[str] = []
        if filters:
            cost = sum(_cost(weight) for weight in filters) / (3 * recipe.batch * flops.flops(network, size))
            if cost > _WORTH:
                filters = []
                self.notes = [f"Muon would add {cost:.0%} to the arithmetic of a step: the optimizer is SGD"]
        rest = [weight for weight in network.parameters() if all(weight is not other for other in filters)]
        decayed = {"params": [weight for weight in rest if weight.ndim > 1], "weight_decay": recipe.weight_decay}
        others = {"params": [weight for weight in rest if weight.ndim <= 1], "weight_decay": 0.0}
        self._sgd = torch.optim.SGD(
            [decayed, others], lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0
        )
        self._muon = _Muon(filters, recipe.momentum, recipe.weight_decay / _RATE, dtype)

    def step(self, rate: float) -> None:
        """Take a step at SGD's learning rate ``rate``."""
        for group in self._sgd.param_groups:
            group["lr"] = rate
        self._sgd.step()
        self._muon.step(_RATE * rate)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next steps depend on beside the weights."""
        return {"sgd": self._sgd.state_dict(), "muon": self._muon.momenta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._sgd.load_state_dict(state["sgd"])
        for own, kept in zip(self._muon.momenta, state["muon"], strict=True):
            own.copy_(kept)


class _Muon:
    """Steps whose singular values are all alike, so that rare directions are learned as fast as common ones.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
    https://kellerjordan.github.io/posts/muon/. Before batch norm the length of weights means nothing, so that a
    step's length is a share of theirs (You et al. 2017, arXiv:1708.03888). `torch.optim.Muon` takes no
    convolutions, multiplies in bfloat16 also where the hardware does not, which is many times slower, and takes
    one matrix after the other.

    Args:
        filters: Weights of convolutions.
        momentum: Of gradients, Nesterov's.
        weight_decay: Share of the weights that a step at the rate 1 takes away.
        dtype: To multiply in.
    """

    def __init__(
        self, filters: list[nn.Parameter], momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        self._filters, self._momentum, self._weight_decay, self._dtype = filters, momentum, weight_decay, dtype
        self.momenta = [torch.zeros_like(weight) for weight in filters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
        for weight, momentum in zip(self._filters, self.momenta, strict=True):
            if weight.grad is not None:
                momentum.lerp_(weight.grad, 1 - self._momentum)
                matrix = weight.grad.lerp(momentum, self._momentum).flatten(1)
                alike.setdefault(matrix.shape, []).append((weight, matrix))
        for some in alike.values():
            steps = orthogonal(torch.stack([matrix for _, matrix in some]).to(self._dtype)).float()
            for (weight, _), step in zip(some, steps, strict=True):
                length = weight.norm().clamp_min(_SHORTEST) / step.norm().clamp_min(_SHORTEST)
                weight.mul_(1 - rate * self._weight_decay)
                weight.sub_(rate * length * step.view(weight.shape))


def orthogonal(matrices: Tensor) -> Tensor:
    """Return the matrices ``(B, M, N)`` with singular values near 1, by Newton-Schulz iterations.

    As few as suffice: with three instead of five, singular values that were small stay smaller (Jordan 2024, "94%
    on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498, in its code).
    """
    wide: Tensor = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = wide @ wide.mT
        wide = a * wide + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ wide
    return wide if matrices.shape[1] <= matrices.shape[2] else wide.mT


def _hidden(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights that Muon is for: of convolutions of all channels, other than those of pixels.

    It is for hidden layers, whose weights are a matrix: not for filters in groups, nor for a classifier. What is
    computed from other weights is no parameter.
    """
    layers = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    weights = (layer.weight for layer in layers if layer.groups == 1 and layer.in_channels > 3)
    return list({id(weight): weight for weight in weights if isinstance(weight, nn.Parameter)}.values())


def _cost(weight: Tensor) -> int:
    """Return the FLOPs of :func:`orthogonal` for a convolution's weights."""
    short, long = sorted((len(weight), weight[0].numel()))
    return _ITERATIONS * (4 * short**2 * long + 2 * short**3)
