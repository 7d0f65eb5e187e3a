"""Forward and backward of one batch within the memory: in parts, or with activations that are computed twice."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from toolkit.compression import distributed
from toolkit.errors import StageError, UsageError

Run = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Backward:
    """Computes the gradients of a batch.

    Where the memory does not suffice, the batch is halved and halved again; the gradients of its parts add up to
    those of the whole batch, but for batch norm, whose statistics are each part's own.

    Args:
        network: Whose gradients.
        loss: Called with logits ``(B, classes)`` float32, labels ``(B,)`` and inputs ``(B, 3, S, S)``; returns a
            mean over the batch.
        autocast: Returns the context that the forward pass is in.
        batch: Images of a whole batch.
        recompute: Whether blocks keep no activations for the backward pass; see :func:`recomputing`.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        autocast: Callable[[], contextlib.AbstractContextManager[object]],
        batch: int,
        *,
        recompute: bool = False,
    ) -> None:
        self._network, self._loss, self._autocast, self._batch = network, loss, autocast, batch
        self._recompute = recompute
        self.parts = 1
        self.run: Run = network

    @property
    def notes(self) -> list[str]:
        """What the user should know: nothing, or that batches are halved."""
        if self.parts == 1:
            return []
        return [
            f"the memory does not suffice for a batch of {self._batch} images: it is computed in {self.parts} "
            "parts, whose gradients are added up"
        ]

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Leave the gradients of a batch in the network; returns its loss, on the device.

        Raises:
            StageError: The memory does not suffice for two images.
        """
        while True:
            self._network.zero_grad(set_to_none=True)
            try:
                return self._whole(inputs, labels)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
            if distributed.size() > 1:  # the others wait for this one in the middle of the same step
                raise StageError(
                    f"the memory of a GPU does not suffice for its {len(inputs)} images of a batch",
                    "set recipe.gradient_checkpointing, or leave out --gpus: one process halves its batches",
                )
            if len(inputs) // (2 * self.parts) < 2:  # batch norm has no variance of one image
                raise StageError(
                    "the memory does not suffice to train on two images at once",
                    "set recipe.gradient_checkpointing or lower input_size in the profile",
                )
            self.parts *= 2
            if inputs.is_cuda:
                torch.cuda.empty_cache()

    def _whole(self, inputs: Tensor, labels: Tensor) -> Tensor:
        whole = self.parts == 1 and len(inputs) == self._batch  # which is what a network is compiled for
        run = self.run if whole else self._network
        mean = torch.zeros((), device=inputs.device)
        parts = min(self.parts, max(1, len(inputs) // 2))  # batch norm has no variance of one image
        for part, truth in zip(inputs.tensor_split(parts), labels.tensor_split(parts), strict=True):
            blocks = recomputing(self._network) if self._recompute else contextlib.nullcontext()
            with self._autocast(), blocks:
                value = self._loss(run(part).float(), truth, part) * (len(part) / len(inputs))
            value.backward()  # type: ignore[no-untyped-call]
            mean += value.detach()
        return mean


@contextlib.contextmanager
def recomputing(network: nn.Module) -> Iterator[None]:
    """Let a forward pass keep only the inputs of blocks; the backward pass computes the rest again.

    Blocks are the elements with parts of their own of the outermost `nn.Sequential`. Everything comes out as it
    would otherwise: dropout draws the same numbers, and batch norm does not count a batch twice (Chen et al. 2016,
    "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174).

    Raises:
        UsageError: There are no such blocks.
    """
    blocks = list(_blocks(network))
    if not blocks:
        raise UsageError(
            "recipe.gradient_checkpointing: the model has no nn.Sequential of blocks that could be computed again",
            "put its blocks into one, or leave the key out",
        )
    for block in blocks:
        contexts = functools.partial(_contexts, block)
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.Sequential) and any(child.children()):
            yield child
        else:
            yield from _blocks(child)


def _contexts(
    block: nn.Module,
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), _counted_already(block)


@contextlib.contextmanager
def _counted_already(block: nn.Module) -> Iterator[None]:
    norms = [norm for norm in block.modules() if isinstance(norm, _BatchNorm)]
    momentum = [norm.momentum for norm in norms]
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    counts = [counter.clone() for counter in counters]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, kept in zip(norms, momentum, strict=True):
            norm.momentum = kept
        for counter, count in zip(counters, counts, strict=True):
            counter.copy_(count)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Tell a lack of memory, which PyTorch has a type of error for on a GPU alone."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
