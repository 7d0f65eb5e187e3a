"""DepGraph: channels that can only go together are found in the network's graph, and the least important ones go.

Fang et al. 2023, "DepGraph: Towards Any Structural Pruning" (arXiv:2301.12900), by its authors' torch-pruning.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.compression import flops
from toolkit.compression.batchnorm import calibration, recalibrate
from toolkit.compression.images import Hardware, Images, accuracy, predict
from toolkit.config import Recipe
from toolkit.errors import UsageError
from toolkit.store import Work

_STEPS = 4  # to the budget; importance is estimated anew at each
_BATCHES, _BATCH = 20, 64  # training images that gradients are taken from


@dataclass
class _Group:
    """Channels that are tied to each other, layer by layer: the n-th of one goes with the n-th of all others.

    Attributes:
        group: DepGraph's own.
        size: How many channels.
        kept: How many of them stay.
        shares: By layer and side (``out``, ``in``): which share of that side's channels they are.
    """

    group: tp.Group
    size: int
    kept: int
    shares: dict[tuple[str, str], float]

    def fewer(self, divisor: int) -> int:
        """Return the next smaller width that is a multiple of the divisor."""
        return (self.kept - 1) // divisor * divisor

    def more(self, divisor: int) -> int:
        """Return the next larger width."""
        return min(self.size, (self.kept // divisor + 1) * divisor)


def _graph(network: nn.Module, size: int) -> tp.DependencyGraph:
    image = torch.zeros(1, 3, size, size, device=next(network.parameters()).device)
    return tp.DependencyGraph().build_dependency(network, image, verbose=False)


def _obstacle(graph: tp.DependencyGraph, group: tp.Group) -> str | None:
    """Return why nothing can be removed of a group, or None."""
    for dependency, _ in group:
        node, layer = dependency.target, dependency.target.module
        if graph.is_out_channel_pruning_fn(dependency.handler) and not node.outputs:
            return "its output is the network's"
        if any(getattr(node.grad_fn, "_saved_pad", ())[4:]):  # after the pads of width and height
            return "zeros are put beside its channels, as in a zero-padded shortcut"
        if isinstance(layer, nn.Parameter):
            return "it meets a parameter that is not a layer's"
        if isinstance(layer, nn.Module) and any(True for _ in layer.parameters()) and not _divisible(layer):
            grouped = "grouped " if getattr(layer, "groups", 1) > 1 else ""
            return f"it meets a {grouped}{type(layer).__name__}"
    return None


def _divisible(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 or layer.groups == layer.in_channels == layer.out_channels
    return isinstance(layer, (nn.Linear, nn.LayerNorm, _BatchNorm))


def _groups(network: nn.Module, graph: tp.DependencyGraph, divisor: int) -> tuple[list[_Group], dict[str, str]]:
    """Return what can be removed, and by layer why the others keep their channels."""
    names = {module: name for name, module in network.named_modules()}
    groups, reasons = [], {}
    for group in graph.get_all_groups():
        size = len(group[0].idxs)
        why = _obstacle(graph, group)
        if why is None and size <= divisor:
            why = f"it has {size} channels, and the channel divisor is {divisor}"
        shares = {}
        for dependency, indices in group:
            layer = dependency.target.module
            if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                continue
            out = graph.is_out_channel_pruning_fn(dependency.handler)
            channels = graph.get_out_channels(layer) if out else graph.get_in_channels(layer)
            shares[names[layer], "out" if out else "in"] = len(indices) / channels
            if out and why is not None:
                reasons[names[layer]] = why
        if why is None:
            groups.append(_Group(group, size, size, shares))
    return groups, reasons


def _remove(graph: tp.DependencyGraph, groups: list[_Group], orders: list[list[int]]) -> None:
    """Remove from each group the first channels in its order, so many that ``kept`` stay."""
    for group, order in zip(groups, orders, strict=True):
        if group.kept < group.size:
            root = group.group[0].dep
            removed = order[: group.size - group.kept]
            graph.get_pruning_group(root.target.module, root.handler, removed).prune()


def smallest(network: nn.Module, name: str, size: int, divisor: int) -> tuple[nn.Module, dict[str, str]]:
    """Return the smallest network that DepGraph can make of one, in place, and by layer why others stay.

    Raises:
        UsageError: DepGraph cannot follow the network.
    """
    try:
        graph = _graph(network, size)
        groups, reasons = _groups(network, graph, divisor)
        for group in groups:
            group.kept = divisor
        _remove(graph, groups, [list(range(group.size)) for group in groups])
        flops.by_layer(network, size)
    except Exception as error:
        raise UsageError(
            f"DepGraph cannot prune the model '{name}': {type(error).__name__}: {str(error).splitlines()[0]}",
            "try --pruner fastnas, or keep the whole network with --flops 100%",
        ) from error
    return network, reasons


def search(
    network: nn.Module,
    train: Images,
    val: Images,
    *,
    size: int,
    limit: float,
    divisor: int,
    recipe: Recipe,
    hardware: Hardware,
    work: Work,
    shared: Path,
) -> nn.Module:
    """Return the better of two pruned networks, by group norm and by Taylor expansion, on the validation images.

    Args:
        network: The trained one, on ``hardware`` already.
        train: Images for the gradients and for batch norm.
        val: Images that score a candidate.
        size: Edge length of an image in pixels.
        limit: FLOPs of one image, at most.
        divisor: Every width is a multiple of it.
        recipe: How the images for batch norm are augmented.
        hardware: Where and in what to compute.
        work: For progress.
        shared: Not used: nothing takes long enough to be kept.
    """
    candidates = []
    for name, importance in {
        "group norm": tp.importance.GroupMagnitudeImportance(),
        "Taylor expansion": tp.importance.GroupTaylorImportance(),
    }.items():
        candidate = copy.deepcopy(network)
        _shrink(candidate, importance, train, size, limit, divisor, hardware)
        with hardware.autocast():
            recalibrate(candidate, calibration(train, recipe))
            value = accuracy(predict(candidate, val), val)
        candidates.append((value, candidate))
        work.progress(len(candidates), 2, f"by {name}: validation {value:.2%}")
    return max(candidates, key=lambda scored: scored[0])[1]


def _shrink(
    network: nn.Module,
    importance: tp.importance.Importance,
    train: Images,
    size: int,
    limit: float,
    divisor: int,
    hardware: Hardware,
) -> None:
    """Remove channels, a part of the way to the limit at a time."""
    whole = flops.flops(network, size)
    rest = whole - sum(flops.by_layer(network, size).values())  # of what has no width of its own, as pooling
    graph = _graph(network, size)
    for step in range(1, _STEPS + 1):
        groups, _ = _groups(network, graph, divisor)
        if isinstance(importance, tp.importance.GroupTaylorImportance):
            _gradients(network, train, hardware)
        scores = [importance(group.group).float() for group in groups]
        part = whole * (limit / whole) ** (step / _STEPS)
        _narrow(groups, scores, flops.by_layer(network, size), part - rest, divisor)
        _remove(graph, groups, [score.argsort().tolist() for score in scores])
    network.zero_grad(set_to_none=True)


def _narrow(groups: list[_Group], scores: list[Tensor], costs: dict[str, int], limit: float, divisor: int) -> None:
    """Set how many channels of each group stay: those go whose importance is least for the FLOPs they take.

    Args:
        groups: Changed in place.
        scores: Importance of each channel ``(size,)``, by group.
        costs: FLOPs by layer, before.
        limit: Their sum afterwards, at most.
        divisor: Every width is a multiple of it.
    """
    importance: list[list[float]] = [
        F.pad(s.sort(descending=True).values.cumsum(0) / s.sum(), (1, 0)).tolist() for s in scores
    ]

    def total() -> float:
        factors: dict[tuple[str, str], float] = {}
        for group in groups:
            for side, share in group.shares.items():
                factors[side] = factors.get(side, 1.0) - share * (1 - group.kept / group.size)
        return sum(
            cost * factors.get((layer, "out"), 1.0) * factors.get((layer, "in"), 1.0)
            for layer, cost in costs.items()
        )

    def with_width(index: int, width: int) -> float:
        kept, groups[index].kept = groups[index].kept, width
        found = total()
        groups[index].kept = kept
        return found

    def price(now: float, index: int, width: int) -> float:
        """Return the share of a group's importance, for each FLOP, between its width and another."""
        share = importance[index][groups[index].kept] - importance[index][width]
        return share / (now - with_width(index, width))

    while (now := total()) > limit:
        narrower = [(i, group.fewer(divisor)) for i, group in enumerate(groups) if group.kept > divisor]
        if not narrower:  # the limit is that of the smallest, whose pooling is smaller too
            return
        index, width = min(narrower, key=lambda choice: price(now, *choice))
        groups[index].kept = width
    while True:  # the last one may have been large: what still fits comes back
        wider = [(i, group.more(divisor)) for i, group in enumerate(groups) if group.kept < group.size]
        fitting = [choice for choice in wider if with_width(*choice) <= limit]
        if not fitting:
            return
        now = total()
        index, width = max(fitting, key=lambda choice: price(now, *choice))
        groups[index].kept = width


def _gradients(network: nn.Module, images: Images, hardware: Hardware) -> None:
    """Leave the gradients of the loss in the parameters."""
    network.eval().zero_grad(set_to_none=True)
    for _, (inputs, labels) in zip(range(_BATCHES), images.batches(_BATCH), strict=False):
        with hardware.autocast():
            loss = F.cross_entropy(network(inputs).float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
