"""FLOPs as Model Optimizer counts them: 2 × MAC for one image, batch norm left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """Let Model Optimizer count FLOPs with whichever torchprofile is installed.

    Model Optimizer 0.47 leaves batch norm out by editing `torchprofile.profile.handlers`, which torchprofile
    0.1.0 no longer has, and it does not undo the edit when tracing fails.
    """
    import modelopt.torch.nas.utils as nas
    from torchprofile import profile

    @contextlib.contextmanager
    def batch_norm_ignored() -> Iterator[None]:
        if hasattr(profile, "HANDLER_MAP"):
            kept = profile.HANDLER_MAP
            changed: object = {op: f for op, f in kept.items() if op != "aten::batch_norm"}
            name = "HANDLER_MAP"
        else:
            kept = profile.handlers
            changed = tuple(
                (tuple(op for op in ([ops] if isinstance(ops, str) else ops) if op != "aten::batch_norm"), f)
                for ops, f in kept
            )
            name = "handlers"
        setattr(profile, name, changed)
        try:  # tracing does not take the weights that autocast has cached
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                yield
        finally:
            setattr(profile, name, kept)

    original = nas.batch_norm_ignored_flops
    nas.batch_norm_ignored_flops = batch_norm_ignored
    try:
        yield
    finally:
        nas.batch_norm_ignored_flops = original


def flops(network: nn.Module, size: int) -> int:
    """Return the FLOPs of one ``(1, 3, size, size)`` image."""
    from modelopt.torch.nas.utils import inference_flops

    device = next(network.parameters()).device
    with counting():
        return int(inference_flops(network, torch.zeros(1, 3, size, size, device=device), unit=1.0))


@torch.no_grad()
def by_layer(network: nn.Module, size: int) -> dict[str, int]:
    """Return the FLOPs of each convolution and linear layer, by name, for one ``(1, 3, size, size)`` image."""
    found: dict[str, int] = {}

    def count(name: str, layer: nn.Conv2d | nn.Linear, output: Tensor) -> None:
        positions = output.numel() // layer.weight.shape[0]
        found[name] = found.get(name, 0) + 2 * layer.weight.numel() * positions

    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: count(name, layer, output))
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    network.eval()
    network(torch.zeros(1, 3, size, size, device=next(network.parameters()).device))
    for hook in hooks:
        hook.remove()
    return found
