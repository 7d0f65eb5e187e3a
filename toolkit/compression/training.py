"""Training and fine-tuning on resident images, continued after any interruption from the last epoch."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.compression import compiling, distributed, flops, models
from toolkit.compression import data as datasets
from toolkit.compression.images import Hardware, Images, accuracy, predict
from toolkit.compression.optimizers import Optimizer
from toolkit.compression.steps import Backward, Loss
from toolkit.config import Recipe
from toolkit.errors import StageError
from toolkit.store import Artifact, Work
from toolkit.workload import Model

_TEACHER_WEIGHT = 0.5  # share of the soft targets in the loss


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, and ask for deterministic algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # a debugging aid of the line above that costs a third of the speed
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def learning_rate(step: int, total: int, recipe: Recipe, base: float) -> float:
    """Return the rate of a step: linear warm-up to ``base × batch / 128``, then cosine to zero."""
    peak = base * recipe.batch / 128
    warm = max(1, round(recipe.warmup * total))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def rewound(recipe: Recipe) -> float:
    """Return the rate of fine-tuning for a batch of 128: what training's was so many epochs before its end.

    At most half of training's highest. Renda et al. 2020, "Comparing Rewinding and Fine-tuning in Neural Network
    Pruning" (learning rate rewinding), arXiv:2003.02389.
    """
    share = min(1.0, recipe.finetune_epochs / max(1, recipe.epochs))
    return recipe.lr * min(0.5, 0.5 * (1 - math.cos(math.pi * share)))


def _cross_entropy(logits: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def _distillation(teacher: nn.Module, temperature: float) -> Loss:
    """Return a loss of labels and the teacher's soft targets (Hinton et al. 2015, arXiv:1503.02531)."""

    def loss(logits: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            targets = F.log_softmax(teacher(inputs).float() / temperature, 1)
        soft = F.kl_div(F.log_softmax(logits / temperature, 1), targets, reduction="batchmean", log_target=True)
        hard = F.cross_entropy(logits, labels)
        return _TEACHER_WEIGHT * temperature**2 * soft + (1 - _TEACHER_WEIGHT) * hard

    return loss


def learning_from(teacher: nn.Module | None, recipe: Recipe, hardware: Hardware) -> Loss:
    """Return the loss of a network that learns from labels, and from a teacher's soft targets if there is one."""
    if teacher is None:
        return _cross_entropy
    return _distillation(hardware.place(teacher).eval(), recipe.temperature)


def find_teacher(
    data: Artifact, model: Model, baseline: Artifact, recipe: Recipe, teacher: Model | None
) -> nn.Module | None:
    """Return who teaches a pruned network: the teacher, else the baseline unless the recipe says otherwise."""
    if teacher is not None:
        return models.build_teacher(teacher, len(data.meta["classes"]))
    return load_baseline(baseline, data, model) if recipe.teacher else None


@dataclass
class Fitted:
    """What became of a training.

    Attributes:
        history: One entry an epoch: ``loss`` (mean) and ``val`` (accuracy, 0 to 1).
        stopped: Why it ended before its last epoch; None where it did not.
        notes: What the user should know of how it went.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str | None = None
    notes: list[str] = field(default_factory=list)


def fit(
    network: nn.Module,
    train: Images,
    val: Images,
    *,
    recipe: Recipe,
    epochs: int,
    base_lr: float,
    seed: int,
    hardware: Hardware,
    work: Work,
    loss: Loss = _cross_entropy,
    small: int = 0,
    stop: Callable[[float], bool] | None = None,
    programs: Path | None = None,
) -> Fitted:
    """Train in place and leave the weights of the last epoch that is as good as the best one in the network.

    That is, whose validation accuracy is at most a standard error below the highest (Breiman et al. 1984,
    "Classification and Regression Trees"): of the highest itself luck decides, and where the learning rate was
    still high, it may be far from what the last epochs come to.

    Every epoch ends with a checkpoint in ``work.resume``; the random numbers of an epoch depend on the seed and
    the epoch alone, so that a continued run gives the same weights as an undisturbed one. A batch that the memory
    does not suffice for is computed in parts whose gradients are added up.

    Args:
        network: On ``hardware`` already.
        train: Training images.
        val: Validation images.
        recipe: Batch, optimizer, momentum, weight decay, warm-up, augmentation, gradient checkpointing.
        epochs: Passes over ``train``.
        base_lr: Learning rate for a batch of 128.
        seed: Of shuffling, augmentation and dropout.
        hardware: Where and in what to compute.
        work: For checkpoints and progress.
        loss: Called with logits ``(B, classes)`` float32, labels ``(B,)`` and inputs ``(B, 3, S, S)``; a mean over
            the batch.
        small: So many epochs, the first, see small crops.
        stop: Asked after each epoch with the validation accuracy (0 to 1); ends the training when it says so.
        programs: Folder of compiled programs, kept between runs; None never compiles.

    Raises:
        StageError: The loss is no longer a number, or two images are too many for the memory.
        UsageError: There is nothing to recompute in the network.
    """
    steps_per_epoch = math.ceil(recipe.images_per_epoch(len(train)) / recipe.batch)
    total = max(1, epochs * steps_per_epoch)
    optimizer = Optimizer(network, recipe, hardware.dtype, train.size)
    checkpoint = work.resume / "checkpoint.pt"
    fitted = Fitted()
    history = fitted.history
    recompute = recipe.gradient_checkpointing
    backward = Backward(distributed.replicate(network), loss, hardware.autocast, recipe.batch, recompute=recompute)
    best: dict[str, Any] = {"val": -1.0, "state": None}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=hardware.device, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        history.extend(saved["history"])
        best, backward.parts = saved["best"], max(1, saved["parts"] // distributed.size())
        work.progress(len(history), epochs, f"continues after epoch {len(history)}")
    short_of_memory = recompute or backward.parts > 1
    if distributed.size() > 1:
        programs = None  # processes that time steps would not decide alike
    plain = program = backward.run
    if programs is not None and len(history) < epochs and len(train) >= recipe.batch and not short_of_memory:
        seed_everything(seed)
        batch = next(train.augmented(recipe, torch.Generator().manual_seed(seed), train.size))
        program = compiling.choose(
            network.train(),
            backward,
            batch,
            (epochs - small) * steps_per_epoch,
            programs,
            lambda text: work.progress(len(history), epochs, text),
        )
    for epoch in range(len(history), epochs):
        if stop is not None and history and stop(history[-1]["val"]):
            fitted.stopped = f"a validation accuracy of {history[-1]['val']:.2%} suffices"
            break
        seed_everything(seed * 100_003 + epoch + (distributed.rank() << 48))  # each has dropout of its own
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        network.train()
        backward.run = plain if epoch < small else program  # which is compiled for one size
        size = recipe.small_side(train.size) if epoch < small else train.size
        losses: list[Tensor] = []  # on the device: nothing waits for them before the epoch is over
        for step, (inputs, labels) in enumerate(train.augmented(recipe, generator, size)):
            losses.append(backward(inputs, labels))
            optimizer.step(learning_rate(epoch * steps_per_epoch + step, total, recipe, base_lr))
        mean = _mean(distributed.mean(torch.stack(losses)), epoch, recipe, checkpoint)
        with hardware.autocast():
            score = distributed.first(lambda: accuracy(predict(network, val), val))
        history.append({"loss": round(mean, 6), "val": score})
        best["val"] = max(best["val"], score)
        if score >= best["val"] - math.sqrt(best["val"] * (1 - best["val"]) / len(val)):
            best["state"] = {k: v.clone() for k, v in network.state_dict().items()}
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
            "best": best,
            "parts": backward.parts,
        }
        if distributed.rank() == 0:
            _keep(state, checkpoint)
        work.progress(epoch + 1, epochs, f"loss {mean:.3f}, validation {score:.2%}")
    if best["state"] is not None:
        network.load_state_dict(best["state"])
    fitted.notes = optimizer.notes + backward.notes
    return fitted


def _keep(state: dict[str, Any], checkpoint: Path) -> None:
    with checkpoint.with_suffix(".new").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    checkpoint.with_suffix(".new").replace(checkpoint)


def _mean(losses: Tensor, epoch: int, recipe: Recipe, checkpoint: Path) -> float:
    """Return the mean loss of an epoch; raises StageError when a step's is no number."""
    lost = (~losses.isfinite()).nonzero()
    if len(lost):
        kept = f"; what epoch {epoch} had reached is kept in {checkpoint}" if checkpoint.exists() else ""
        raise StageError(
            f"the loss is no longer a number in epoch {epoch + 1}, step {int(lost[0]) + 1} of {len(losses)}{kept}",
            f"halve the learning rate: recipe.lr {recipe.lr / 2:g} in the profile instead of {recipe.lr:g}",
        )
    return losses.mean().item()


def measure(network: nn.Module, data: Artifact, hardware: Hardware, keep: Path | None = None) -> dict[str, Any]:
    """Return what is told of a network: test accuracy in fp32 (0 to 1), FLOPs, MACs, parameters.

    Args:
        network: On ``hardware`` already.
        data: Its test images are what accuracy is measured on.
        hardware: Where to compute.
        keep: Folder for ``test.logits.npy``, float32 ``(N, classes)``, which the accuracy is counted from.
    """
    test = Images(datasets.load(data, "test"), data.meta, hardware)
    logits = predict(network, test)
    if keep is not None:
        np.save(keep / "test.logits.npy", logits.float().cpu().numpy())
    count = flops.flops(network, data.meta["input_size"])
    return {
        "accuracy": accuracy(logits, test),
        "flops": count,
        "macs": count // 2,
        "params": models.parameters(network),
    }


def train(
    work: Work,
    data: Artifact,
    model: Model,
    recipe: Recipe,
    seed: int,
    *,
    programs: Path | None = None,
    downloads: Path | None = None,
    teacher: Model | None = None,
) -> dict[str, Any]:
    """Train the unpruned network; writes ``model.safetensors`` and ``test.logits.npy``.

    Args:
        work: Output and progress.
        data: The data artifact.
        model: The network's definition, and which weights it starts from.
        recipe: How to train.
        seed: Of everything random.
        programs: Folder of compiled programs, kept between runs; None never compiles.
        downloads: Folder of torchvision's weights.
        teacher: A network to learn from (soft targets), with its checkpoint.

    Returns:
        ``accuracy``, ``flops``, ``macs``, ``params``, what :class:`Fitted` holds, and ``val`` (validation accuracy,
        0 to 1) of weights that are taken as they are.
    """
    hardware = Hardware.find()
    seed_everything(seed)
    classes = len(data.meta["classes"])
    val = Images(datasets.load(data, "val").first(recipe.val_images), data.meta, hardware)
    network = hardware.place(models.build(model, classes, seed, downloads))
    knowing = models.build_teacher(teacher, classes) if teacher else None
    fitted = fit(
        network,
        Images(datasets.load(data, "train"), data.meta, hardware),
        val,
        recipe=recipe,
        epochs=recipe.epochs,
        base_lr=recipe.lr,
        seed=seed,
        hardware=hardware,
        work=work,
        programs=programs,
        loss=learning_from(knowing, recipe, hardware),
        small=recipe.small_epochs,
    )
    if distributed.rank() > 0:
        return {}
    # each its own: the format has no name for a tensor that two layers share
    state = {key: value.cpu().contiguous().clone() for key, value in network.state_dict().items()}
    save_file(state, work.out / "model.safetensors")
    result = measure(network, data, hardware, work.out) | asdict(fitted)
    return result if fitted.history else result | {"val": accuracy(predict(network, val), val)}


def load_baseline(baseline: Artifact, data: Artifact, model: Model) -> nn.Module:
    """Return the trained, unpruned network on the CPU."""
    network = models.build(model.model_copy(update={"weights": None}), len(data.meta["classes"]), seed=0)
    network.load_state_dict(load_file(baseline.file("model.safetensors")))
    return network


def finetune(
    work: Work,
    data: Artifact,
    model: Model,
    baseline: Artifact,
    pruned: Artifact,
    recipe: Recipe,
    seed: int,
    *,
    programs: Path | None = None,
    teacher: Model | None = None,
    enough: float | None = None,
) -> dict[str, Any]:
    """Fine-tune the pruned network; writes ``model.pth`` and ``test.logits.npy``.

    The teacher, or else the baseline, teaches it (soft targets); without a teacher the recipe may say otherwise.
    A network that was not pruned is kept as it is.

    Args:
        work: Output and progress.
        data: The data artifact.
        model: The network's definition.
        baseline: The trained, unpruned network.
        pruned: The pruned one.
        recipe: How to train.
        seed: Of everything random.
        programs: Folder of compiled programs, kept between runs; None never compiles.
        teacher: A network to learn from, with its checkpoint.
        enough: Validation accuracy (0 to 1) that ends it early; None for all epochs.

    Returns:
        ``accuracy``, ``flops``, ``macs``, ``params``, and what :class:`Fitted` holds.
    """
    hardware = Hardware.find()
    seed_everything(seed)
    classes = len(data.meta["classes"])
    network = hardware.place(models.restore(model, classes, pruned.file("model.pth")))
    fitted = Fitted()
    if pruned.meta["pruned"]:
        knowing = find_teacher(data, model, baseline, recipe, teacher)
        fitted = fit(
            network,
            Images(datasets.load(data, "train"), data.meta, hardware),
            Images(datasets.load(data, "val").first(recipe.val_images), data.meta, hardware),
            recipe=recipe,
            epochs=recipe.finetune_epochs,
            base_lr=rewound(recipe),
            seed=seed,
            hardware=hardware,
            work=work,
            loss=learning_from(knowing, recipe, hardware),
            stop=None if enough is None else lambda accuracy: accuracy >= enough,
            programs=programs,
        )
    if distributed.rank() > 0:
        return {}
    result = measure(network, data, hardware, work.out) | asdict(fitted)
    models.save(network, work.out / "model.pth")
    return result
