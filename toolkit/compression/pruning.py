"""Pruning to a FLOPs budget: what every pruner shares; how each one chooses widths stands in its own module.

A pruner is a module with two functions: ``smallest`` returns the smallest network that it can make of one, with
the reasons why layers stay, and ``search`` the best network within a limit of FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from toolkit import units
from toolkit.compression import data as datasets
from toolkit.compression import flops, models
from toolkit.compression.batchnorm import calibration, recalibrate
from toolkit.compression.images import Hardware, Images
from toolkit.compression.training import load_baseline, measure, seed_everything
from toolkit.config import Flops, PrunerName, Recipe
from toolkit.errors import StageError, UsageError
from toolkit.store import Artifact, Work
from toolkit.workload import Model


@dataclass(frozen=True)
class Reach:
    """What pruning can do to a network.

    Attributes:
        flops: Of the whole.
        smallest: FLOPs of the smallest that is left of it.
        skipped: Layers that stay as they are, input and output: why.
        unprunable: Share of the FLOPs (0 to 1) that is not in layers which shrink.
    """

    flops: int
    smallest: int
    skipped: dict[str, str]
    unprunable: float


def _module(pruner: PrunerName) -> ModuleType:
    """Return a pruner; raises UsageError where it takes a package that is not installed."""
    if pruner == "fastnas":
        from toolkit.compression import fastnas

        return fastnas
    try:
        from toolkit.compression import depgraph
    except ModuleNotFoundError as missing:
        raise UsageError(
            f"the pruner 'depgraph' needs a package that is not installed: {missing.name}",
            "in the toolkit's checkout: python3 -m pip install -e '.[depgraph]'; or use --pruner fastnas",
        ) from missing
    return depgraph


def reach(network: nn.Module, name: str, size: int, divisor: int, pruner: PrunerName) -> Reach:
    """Return how far a network can be pruned; changes it.

    Raises:
        UsageError: The pruner cannot follow the network, or is not installed.
    """
    whole, before = flops.flops(network, size), flops.by_layer(network, size)
    smallest, reasons = _module(pruner).smallest(network, name, size, divisor)
    after = flops.by_layer(smallest, size)
    shrinking = {layer for layer in before if after[layer] < before[layer]}
    return Reach(
        whole,
        flops.flops(smallest, size),
        {layer: reasons.get(layer, "the pruner does not reach it") for layer in before if layer not in shrinking},
        1 - sum(before[layer] for layer in shrinking) / whole,
    )


def check(
    data: Artifact,
    model: Model,
    divisor: int,
    pruner: PrunerName,
    downloads: Path,
    teacher: Model | None = None,
    small: int | None = None,
) -> dict[str, Any]:
    """Build the networks and see, before anything expensive, whether they can be used, and one be pruned how far.

    Args:
        data: Their classes and the size of their images.
        model: The network's definition.
        divisor: Channels are pruned to multiples of it.
        pruner: That the network is pruned with.
        downloads: Folder of torchvision's weights.
        teacher: A network to learn from.
        small: Side of the small crops that training begins with; None for none.

    Returns:
        ``flops``, ``params``, ``pruner``, and of :class:`Reach` ``smallest``, ``skipped``, ``unprunable``; where
        the pruner cannot follow the network, ``smallest`` and ``unprunable`` are None, and ``obstacle`` says why.
    """
    _module(pruner)
    size, classes = data.meta["input_size"], len(data.meta["classes"])
    network = models.build(model, classes, 0, downloads)
    models.check(network, str(model), size, classes, small)
    if teacher is not None:
        knowing = (
            models.build_teacher(teacher, classes)
            if teacher.checkpoint
            else models.build(teacher, classes, 0, downloads)
        )
        models.check(knowing, str(teacher), size, classes, small)
    found = {"params": models.parameters(network), "flops": flops.flops(network, size), "pruner": pruner}
    try:
        possible = reach(network, str(model), size, divisor, pruner)
    except UsageError as error:
        return found | {"smallest": None, "skipped": {}, "unprunable": None, "obstacle": error.message}
    return found | {
        "smallest": possible.smallest,
        "skipped": possible.skipped,
        "unprunable": possible.unprunable,
        "obstacle": None,
    }


def prune(
    work: Work,
    data: Artifact,
    model: Model,
    baseline: Artifact,
    recipe: Recipe,
    budget: Flops,
    divisor: int,
    pruner: PrunerName,
    searches: Path,
    seed: int,
) -> dict[str, Any]:
    """Search the network of highest validation accuracy within the budget; writes ``model.pth``.

    Args:
        work: Output and progress.
        data: The data artifact; training images calibrate, validation images score.
        model: The network's definition.
        baseline: The trained network.
        recipe: For the number of images, and how those that calibrate are augmented.
        budget: FLOPs of the result, at most.
        divisor: Every width is a multiple of it.
        pruner: Which one.
        searches: Folder of what the searches found out, shared by all budgets of a baseline.
        seed: Of everything random.

    Returns:
        ``accuracy`` (before fine-tuning), ``flops``, ``macs``, ``params``, ``pruner``, ``pruned`` (whether
        anything was removed) and ``widths`` (channels a layer: before, after).

    Raises:
        StageError: The pruner has not come within the budget.
    """
    hardware = Hardware.find()
    seed_everything(seed)
    network = load_baseline(baseline, data, model).to(hardware.device)  # FastNAS converts no channels_last one
    limit = budget.resolve(baseline.meta["flops"])
    before = _widths(network)
    pruned = limit < baseline.meta["flops"]
    if pruned:
        train = Images(datasets.load(data, "train"), data.meta, hardware)
        val = Images(
            datasets.load(data, "val").first(recipe.val_images).first(recipe.search_images), data.meta, hardware
        )
        known = baseline.digest[:16], divisor, len(train), len(val), *recipe.augmentation.values()
        network = _module(pruner).search(
            network,
            train,
            val,
            size=data.meta["input_size"],
            limit=limit,
            divisor=divisor,
            recipe=recipe,
            hardware=hardware,
            work=work,
            shared=searches / "-".join(map(str, known)),
        )
        with hardware.autocast():
            recalibrate(hardware.place(network), calibration(train, recipe))
    result = measure(network, data, hardware)
    if pruned and result["flops"] > limit:
        raise StageError(
            f"{pruner} found no network within {units.flops(limit)}, but one of {units.flops(result['flops'])}",
            "raise --flops, or take the other --pruner",
        )
    after = _widths(network)
    models.save(network, work.out / "model.pth")
    widths = {name: [before[name], after[name]] for name in before}
    return result | {"pruner": pruner, "pruned": pruned, "widths": widths}


def _widths(network: nn.Module) -> dict[str, int]:
    return {
        name: module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
