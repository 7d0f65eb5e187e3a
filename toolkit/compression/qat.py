"""Quantisation-aware training: a few epochs in which the forward pass rounds as int8 does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from toolkit.compression import data as datasets
from toolkit.compression import training
from toolkit.compression.images import Hardware, Images
from toolkit.compression.spelling import Levels
from toolkit.config import Recipe
from toolkit.store import Artifact, Work

_RATE = 0.01  # of the training's; Wu et al. 2020, arXiv:2004.09602, section 5


def train(
    work: Work,
    data: Artifact,
    network: nn.Module,
    levels: Mapping[str, Levels],
    recipe: Recipe,
    seed: int,
    teacher: nn.Module | None = None,
) -> training.Fitted:
    """Train a network in place so that it loses little when it is quantised; its weights stay float32.

    What a layer reads is rounded to its calibrated levels, its weights to 255 levels an output channel. The
    gradient passes through the rounding as if it were not there (Bengio et al. 2013, arXiv:1308.3432) and is zero
    where a value is clipped. Batch norm keeps its statistics: it is the constant factor that it will be folded to,
    which leaves the levels of a channel as they are.

    Args:
        work: For checkpoints and progress.
        data: Training images, and validation images that choose the epoch.
        network: In float32, on the CPU, where it is again afterwards.
        levels: By the name of a convolution or linear layer; layers that are not in it compute in float32.
        recipe: How to train: ``qat_epochs`` at a hundredth of its learning rate.
        seed: Of everything random.
        teacher: Whose soft targets are learned; None learns from the labels alone.
    """
    hardware = Hardware.find()
    with rounded(network, levels):
        fitted = training.fit(
            hardware.place(_KeepsStatistics(network)),
            Images(datasets.load(data, "train"), data.meta, hardware),
            Images(datasets.load(data, "val").first(recipe.val_images), data.meta, hardware),
            recipe=recipe.model_copy(update={"optimizer": "sgd"}),  # whose rate the hundredth is of
            epochs=recipe.qat_epochs,
            base_lr=_RATE * recipe.lr,
            seed=seed,
            hardware=hardware,
            work=replace(work, progress=lambda done, total, text: work.progress(done, total, f"for int8: {text}")),
            loss=training.learning_from(teacher, recipe, hardware),
        )
    network.cpu()
    return fitted


@contextlib.contextmanager
def rounded(network: nn.Module, levels: Mapping[str, Levels]) -> Iterator[None]:
    """Let convolutions and linear layers compute with int8's levels: of what they read, and of their weights."""
    layers = {
        name: layer
        for name, layer in network.named_modules()
        if name in levels and isinstance(layer, (nn.Conv2d, nn.Linear))
    }
    hooks = [layer.register_forward_pre_hook(_rounded_input(levels[name])) for name, layer in layers.items()]
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", _RoundedWeight())
    try:
        yield
    finally:
        for hook, layer in zip(hooks, layers.values(), strict=True):
            hook.remove()
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


class _KeepsStatistics(nn.Module):
    """A network whose batch norm keeps its statistics while the rest is trained."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    def train(self, mode: bool = True) -> _KeepsStatistics:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


class _RoundedWeight(nn.Module):
    """Weights ``(output channels, ...)`` at int8's levels, symmetric, with a scale a channel."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().flatten(1).amax(1).clamp_min(torch.finfo(weight.dtype).tiny * 127) / 127
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


def _rounded_input(levels: Levels) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    at = levels.scale, levels.zero, levels.lowest, levels.lowest + 255
    return lambda layer, inputs: torch.fake_quantize_per_tensor_affine(inputs[0].float(), *at)
