"""Batch norm's statistics, taken anew: pruning changes what comes in."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.compression.images import Images

_BATCHES = 50  # as many as Model Optimizer takes


def calibration(images: Images) -> Iterator[Tensor]:
    """Yield batches to calibrate batch norm with, as many as Model Optimizer takes; few images come again."""
    size = min(64, max(8, len(images) // _BATCHES))
    passes = (inputs for _ in itertools.count() for inputs, _ in images.batches(size))
    batches = (inputs for inputs in passes if len(inputs) > 1)  # one image may have no variance
    return itertools.islice(batches, _BATCHES)


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
