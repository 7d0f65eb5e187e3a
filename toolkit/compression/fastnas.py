"""Model Optimizer's FastNAS: which layer's width costs how much accuracy, then the best network in a budget."""

from __future__ import annotations

import copy
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit.compression import flops
from toolkit.compression.batchnorm import calibration, recalibrate
from toolkit.compression.images import Hardware, Images
from toolkit.compression.scoring import Scorer
from toolkit.config import Recipe
from toolkit.errors import UsageError
from toolkit.store import Work

log = logging.getLogger(__name__)


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


def smallest(network: nn.Module, name: str, size: int, divisor: int) -> tuple[nn.Module, dict[str, str]]:
    """Return the smallest network that FastNAS can make of one, in place, and by layer why others stay.

    Raises:
        UsageError: FastNAS cannot trace the network.
    """
    import modelopt.torch.nas as mtn
    from modelopt.torch.prune.pruning import PruneModeRegistry

    try:
        space = mtn.convert(network, _mode(divisor), registry=PruneModeRegistry)
        mtn.sample(space, min)
        flops.flops(space, size)
    except Exception as error:
        raise UsageError(
            f"FastNAS cannot trace the model '{name}': {type(error).__name__}: {str(error).splitlines()[0]}",
            "avoid Python control flow that depends on tensor values in forward(), or keep the whole network "
            "with --flops 100%",
        ) from error
    return space, {name: why for name, layer in space.named_modules() if (why := _obstacle(layer, divisor))}


def _obstacle(layer: nn.Module, divisor: int) -> str | None:
    """Return why a layer's width stays, or None."""
    from modelopt.torch.opt.dynamic import DynamicModule

    if isinstance(layer, nn.Conv2d):
        width, key = layer.out_channels, "out_channels"
    elif isinstance(layer, nn.Linear):
        width, key = layer.out_features, "out_features"
    else:
        return None
    if isinstance(layer, DynamicModule) and layer.get_hparam(key).is_configurable:
        return None
    if width <= divisor:
        return f"it has {width} channels, and the channel divisor is {divisor}"
    return "its channels are tied to some that stay: the network's output, or a shape that FastNAS does not follow"


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
    """Return the network of highest validation accuracy whose FLOPs are within a limit.

    Model Optimizer bisects how much accuracy any layer's width may cost, up to, but never with, the most that one
    costs. Near the smallest network nothing is within the limit then, and it returns what is not: then the most
    sensitive layer is given its smallest width first, and the next one, until something is.

    Args:
        network: The trained one, on ``hardware`` already.
        train: Images that recalibrate batch norm.
        val: Images that score a candidate.
        size: Edge length of an image in pixels.
        limit: FLOPs of one image, at most.
        divisor: Every width is a multiple of it.
        recipe: How the images that recalibrate batch norm are augmented.
        hardware: Where and in what to compute.
        work: For the unfinished search and progress.
        shared: File stem of what the search finds out that holds for every budget of this baseline.
    """
    import modelopt.torch.prune as mtp

    scorer = Scorer(lambda: calibration(train, recipe), val)
    evaluated = 0

    def score(candidate: nn.Module) -> float:
        nonlocal evaluated
        evaluated += 1
        value = scorer(candidate)
        work.progress(evaluated, 0, f"candidate {evaluated}: validation {value:.2%}")
        return value

    kept = shared.with_suffix(".pth")
    checkpoint = _open_search(work, kept)

    def prune() -> nn.Module:
        pruned, _ = mtp.prune(
            copy.deepcopy(network),
            _mode(divisor),
            {"flops": limit},
            torch.zeros(1, 3, size, size, device=hardware.device),
            {
                # with data it would calibrate batch norm to count FLOPs, too; the scorer does where scores need it
                "data_loader": None,
                "score_func": score,
                "checkpoint": str(checkpoint),
                "verbose": False,
            },
        )
        assert isinstance(pruned, nn.Module)
        return pruned

    with hardware.autocast(), flops.counting():
        recalibrate(network, calibration(train, recipe))  # as Model Optimizer would, had it data
        pruned = prune()
        _share_search(checkpoint, kept)
        while flops.flops(pruned, size) > limit and _give_in(checkpoint):
            pruned = prune()
    return pruned


def _give_in(checkpoint: Path) -> bool:
    """Have the most sensitive layer cost nothing, so that it gets its smallest width; whether there is one."""
    state = torch.load(checkpoint, weights_only=True)
    widths: dict[int, float] = max(state["sensitivity_map"].values(), key=lambda costs: max(costs.values()))
    if max(widths.values()) <= 0:
        return False
    widths.update(dict.fromkeys(widths, 0.0))
    torch.save(state, checkpoint)
    return True


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
