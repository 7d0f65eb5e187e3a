"""Images on the device that computes, and what a network says of them."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit import units
from toolkit.compression import data as datasets
from toolkit.compression import distributed
from toolkit.config import Recipe
from toolkit.errors import StageError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Hardware:
    """Where the arithmetic is done, and in what."""

    device: torch.device
    bf16: bool

    @classmethod
    def find(cls) -> Hardware:
        """Use CUDA where there is one; bf16 where the hardware computes in it."""
        if torch.cuda.is_available():
            return cls(torch.device("cuda"), torch.cuda.is_bf16_supported(including_emulation=False))
        _keep_freed_memory()
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return cls(torch.device("cpu"), bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")))

    @property
    def dtype(self) -> torch.dtype:
        """What it multiplies matrices in fastest."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in bf16 where the hardware has it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network here, in the memory layout that convolutions are fastest in."""
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _keep_freed_memory() -> None:
    """Have the C library keep what PyTorch frees, where it is GNU's.

    Every step of a training frees all its activations. By default they go back to the kernel, and to get them
    again, page by page, takes up to a third of a step where several threads wait (benchmarks/allocation.py).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and (mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)):
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


class Images:
    """One split on the device: uint8 images, labels, and the way from the one to a network's input.

    Args:
        split: Images ``(N, 3, S, S)`` uint8 and labels ``(N,)``.
        meta: Of the ``data`` artifact; ``mean`` and ``std`` a channel, on a scale of 0 to 1.
        hardware: Where to keep them.
    """

    def __init__(self, split: datasets.Split, meta: dict[str, Any], hardware: Hardware) -> None:
        try:
            self.images = torch.from_numpy(np.array(split.images)).to(hardware.device)
        except torch.OutOfMemoryError:
            raise StageError(
                f"the GPU's memory does not hold the {len(split.labels):,} images of a split, "
                f"{units.size(split.images.nbytes)}",
                "lower input_size in the profile, or give fewer images",
            ) from None
        self.labels = torch.from_numpy(np.array(split.labels)).to(hardware.device)
        self.mean = 255 * torch.tensor(meta["mean"], device=hardware.device).view(3, 1, 1)
        self.scale = 1 / (255 * torch.tensor(meta["std"], device=hardware.device).view(3, 1, 1))

    def __len__(self) -> int:
        return len(self.labels)

    def normalise(self, batch: Tensor) -> Tensor:
        """Turn uint8 ``(B, 3, S, S)`` into the float32 input of a network."""
        return ((batch.float() - self.mean) * self.scale).contiguous(memory_format=torch.channels_last)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images in order, as network input, with their labels."""
        for start in range(0, len(self), size):
            yield self.normalise(self.images[start : start + size]), self.labels[start : start + size]

    def evaluation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images in order, in batches of a size that inference is fast at."""
        pixels = self.size**2
        return self.batches(max(16, min(1024, (1 << 22) // pixels)) if self.images.is_cuda else 128)

    @property
    def size(self) -> int:
        """Side of the images."""
        return self.images.shape[-1]

    def augmented(self, recipe: Recipe, generator: torch.Generator, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of shuffled, randomly cropped, flipped and cut out batches; the last one may be smaller.

        Of more images than the recipe has an epoch see, each epoch draws its own.
        All random numbers are drawn and moved to the device before the first batch, so that none waits for them.

        Args:
            recipe: How much of each.
            generator: Of the random numbers.
            size: Side of the crops, at most that of the images.
        """
        count, pad = recipe.images_per_epoch(len(self)), recipe.crop
        places = self.size + 2 * pad - size + 1
        order = torch.randperm(len(self), generator=generator)[:count]
        shift = torch.randint(0, places, (2, count, 1), generator=generator).squeeze(2)
        flipped = torch.rand(count, 1, 1, 1, generator=generator) < (0.5 if recipe.flip else 0.0)
        centre = torch.randint(0, size, (2, count if recipe.cutout else 0, 1), generator=generator)
        order, shift, flipped, centre = (part.to(self.images.device) for part in (order, shift, flipped, centre))
        for start in range(0, count, recipe.batch):
            batch = distributed.share(slice(start, min(count, start + recipe.batch)))
            indices = order[batch]
            if len(indices) < 2:  # batch norm has no variance of one image
                continue
            padded = F.pad(self.images[indices], (pad, pad, pad, pad))
            windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # a view: (B, 3, places, places, size, size)
            every = torch.arange(len(indices), device=padded.device)
            crops = windows[every, :, shift[0, batch], shift[1, batch]]
            crops = torch.where(flipped[batch], crops.flip(3), crops)
            inputs = self.normalise(crops)
            if recipe.cutout:  # DeVries and Taylor 2017, arXiv:1708.04552
                offset = torch.arange(size, device=padded.device) - centre[:, batch] + recipe.cutout // 2
                rows, columns = (offset >= 0) & (offset < recipe.cutout)  # each (B, S)
                inputs.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0)
            yield inputs, self.labels[indices]


@torch.no_grad()
def predict(network: nn.Module, images: Images) -> Tensor:
    """Return logits ``(N, classes)`` of all images, in order; computes in the surrounding autocast, if any."""
    network.eval()
    return torch.cat([network(inputs) for inputs, _ in images.evaluation()])


def accuracy(logits: Tensor, images: Images) -> float:
    """Return the top-1 accuracy (0 to 1) of logits ``(N, classes)``."""
    return (logits.argmax(1) == images.labels).sum().item() / len(images)
