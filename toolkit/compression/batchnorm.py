"""Batch norm's statistics, taken anew: pruning changes what comes in."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.compression.images import Images
from toolkit.config import Recipe

_BATCHES = 50  # as many as Model Optimizer takes


def calibration(images: Images, recipe: Recipe) -> Iterator[Tensor]:
    """Yield batches to calibrate batch norm with, as many as Model Optimizer takes and the same at every call.

    They are augmented as in training: statistics of whole images, without the borders that cropping adds, are
    not those that the weights have been fitted to. Few images come again, augmented otherwise.

    Args:
        images: Training images.
        recipe: How they are cropped, flipped and cut out.
    """
    size = min(64, max(8, len(images) // _BATCHES))
    recipe = recipe.model_copy(update={"batch": size, "train_images": size * _BATCHES})
    generator = torch.Generator().manual_seed(0)
    passes = (inputs for _ in itertools.count() for inputs, _ in images.augmented(recipe, generator, images.size))
    return itertools.islice(passes, _BATCHES)


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set batch norm's statistics to those of the batches; computes in the surrounding autocast, if any."""
    network.eval()
    with calibrating([module for module in network.modules() if isinstance(module, _BatchNorm)]):
        for inputs in batches:
            network(inputs)


@contextlib.contextmanager
def calibrating(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let batch norms take their statistics from what is run inside, on average over its batches."""
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # a cumulative average
    yield
    for norm, kept in zip(norms, momentum, strict=True):
        norm.eval()
        norm.momentum = kept
