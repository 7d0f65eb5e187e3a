"""Pruning to a FLOPs budget with Model Optimizer's FastNAS."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.compression import data as datasets
from toolkit.compression import flops, models
from toolkit.compression.training import (
    Hardware,
    Images,
    accuracy,
    load_baseline,
    measure,
    predict,
    seed_everything,
)
from toolkit.config import Flops, Model, Recipe
from toolkit.errors import UsageError
from toolkit.store import Artifact, Work

log = logging.getLogger(__name__)

_CALIBRATION_BATCHES = 50  # what FastNAS keeps for recalibrating batch norm; with fewer it does not recalibrate


@dataclass(frozen=True)
class Reach:
    """What FastNAS can do to a network: FLOPs of the whole, and of its smallest subnetwork."""

    flops: int
    smallest: int


def _mode(divisor: int) -> list[tuple[str, dict[str, Any]]]:
    """Return FastNAS's configuration with every width a multiple of ``divisor``."""
    from modelopt.torch.prune.fastnas import FastNASConfig

    config = FastNASConfig().model_dump()
    for rules in config.values():
        for rule in (rules or {}).values():
            for key in ("channel_divisor", "feature_divisor"):
                if key in rule:
                    rule[key] = divisor
    return [("fastnas", config)]


def reach(network: nn.Module, name: str, size: int, divisor: int) -> Reach:
    """Return the FLOPs that pruning can reach; converts the network.

    Raises:
        UsageError: FastNAS cannot trace the network.
    """
    import modelopt.torch.nas as mtn
    from modelopt.torch.prune.pruning import PruneModeRegistry

    whole = flops.flops(network, size)
    try:
        space = mtn.convert(network, _mode(divisor), registry=PruneModeRegistry)
        mtn.sample(space, min)
        smallest = flops.flops(space, size)
    except Exception as error:
        raise UsageError(
            f"FastNAS cannot trace the model '{name}': {type(error).__name__}: {str(error).splitlines()[0]}",
            "avoid Python control flow that depends on tensor values in forward(), or keep the whole network "
            "with --flops 100%",
        ) from error
    return Reach(whole, smallest)


def check(data: Artifact, model: Model, divisor: int) -> dict[str, Any]:
    """Build the network and see, before anything expensive, whether it can be used and how far it can be pruned.

    Returns:
        ``flops``, ``params``, ``smallest`` (FLOPs that FastNAS can reach; None where it cannot trace the
        network) and ``obstacle`` (why it cannot).
    """
    size, classes = data.meta["input_size"], len(data.meta["classes"])
    network = models.build(model, classes, seed=0)
    models.check(network, str(model), size, classes)
    found = {"params": models.parameters(network), "flops": flops.flops(network, size)}
    try:
        return found | {"smallest": reach(network, str(model), size, divisor).smallest, "obstacle": None}
    except UsageError as error:
        return found | {"smallest": None, "obstacle": error.message}


class _Batches:
    """Batches for FastNAS's batch norm calibration: never-ending passes over the training images."""

    def __init__(self, images: Images, batch: int) -> None:
        self.images, self.batch = images, batch

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            for inputs, _ in self.images.batches(self.batch):
                yield inputs


def prune(
    work: Work,
    data: Artifact,
    model: Model,
    baseline: Artifact,
    recipe: Recipe,
    budget: Flops,
    divisor: int,
    searches: Path,
    seed: int,
) -> dict[str, Any]:
    """Search the network of highest validation accuracy within the budget; writes ``model.pth``.

    Args:
        work: Output and progress.
        data: The data artifact; training images calibrate, validation images score.
        model: The network's definition.
        baseline: The trained network.
        recipe: For the number of images.
        budget: FLOPs of the result, at most.
        divisor: Every width is a multiple of it.
        searches: Folder of the searches' checkpoints, shared by all budgets of a baseline.
        seed: Of everything random.

    Returns:
        ``accuracy`` (before fine-tuning), ``flops``, ``macs``, ``params``, ``pruned`` (whether anything was
        removed) and ``widths`` (channels a layer: before, after).
    """
    import modelopt.torch.prune as mtp

    hardware = Hardware.find()
    seed_everything(seed)
    network = load_baseline(baseline, data, model).to(hardware.device)  # it converts no channels_last network
    limit = budget.resolve(baseline.meta["flops"])
    before = _widths(network)
    pruned = limit < baseline.meta["flops"]
    if pruned:
        size = data.meta["input_size"]
        train = Images(datasets.load(data, "train").first(recipe.train_images), data.meta, hardware)
        val = Images(
            datasets.load(data, "val").first(recipe.val_images).first(recipe.search_images), data.meta, hardware
        )
        evaluated = 0

        def score(candidate: nn.Module) -> float:
            nonlocal evaluated
            evaluated += 1
            value = accuracy(predict(candidate, val), val)
            work.progress(evaluated, 0, f"candidate {evaluated}: validation {value:.2%}")
            return value

        search = searches / f"{baseline.digest[:16]}-{divisor}-{len(train)}-{len(val)}.pth"
        checkpoint = _open_search(work, search)
        with hardware.autocast(), flops.counting():
            network, _ = mtp.prune(
                network,
                _mode(divisor),
                {"flops": limit},
                torch.zeros(1, 3, size, size, device=hardware.device),
                {
                    "data_loader": _Batches(train, min(64, max(8, len(train) // _CALIBRATION_BATCHES))),
                    "collect_func": lambda inputs: inputs,
                    "max_iter_data_loader": _CALIBRATION_BATCHES,
                    "score_func": score,
                    "checkpoint": str(checkpoint),
                    "verbose": False,
                },
            )
        _share_search(checkpoint, search)
    result = measure(network, data, hardware)
    after = _widths(network)
    models.save(network, work.out / "model.pth")
    return result | {"pruned": pruned, "widths": {name: [before[name], after[name]] for name in before}}


def _open_search(work: Work, shared: Path) -> Path:
    """Return this stage's copy of the search's checkpoint: its own unfinished one, or the one that is shared.

    Model Optimizer rewrites its checkpoint in place, so that a kill can leave half of one: that is dropped.
    """
    own = work.resume / "search.pth"
    if shared.exists():
        shutil.copyfile(shared, own)
    if own.exists():
        try:
            torch.load(own, weights_only=True)
        except Exception as error:
            log.warning("the search's checkpoint cannot be read and is dropped: %s", error)
            own.unlink()
    return own


def _share_search(own: Path, shared: Path) -> None:
    if own.exists():
        shared.parent.mkdir(parents=True, exist_ok=True)
        temporary = shared.with_suffix(f".{os.getpid()}")
        shutil.copyfile(own, temporary)
        temporary.replace(shared)


def _widths(network: nn.Module) -> dict[str, int]:
    return {
        name: module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
