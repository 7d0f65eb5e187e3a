"""Training and fine-tuning on resident images, continued after any interruption from the last epoch."""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.compression import data as datasets
from toolkit.compression import flops, models
from toolkit.config import Model, Recipe
from toolkit.errors import StageError
from toolkit.store import Artifact, Work

_TEACHER_WEIGHT = 0.9  # share of the soft targets in the loss


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
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return cls(torch.device("cpu"), bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in bf16 where the hardware has it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network here, in the memory layout that convolutions are fastest in."""
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class Images:
    """One split on the device: uint8 images, labels, and the way from the one to a network's input.

    Args:
        split: Images ``(N, 3, S, S)`` uint8 and labels ``(N,)``.
        meta: Of the ``data`` artifact; ``mean`` and ``std`` a channel, on a scale of 0 to 1.
        hardware: Where to keep them.
    """

    def __init__(self, split: datasets.Split, meta: dict[str, Any], hardware: Hardware) -> None:
        self.images = torch.from_numpy(np.array(split.images)).to(hardware.device)
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

    def augmented(self, recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of shuffled, randomly cropped and flipped batches; the last one may be smaller."""
        order = torch.randperm(len(self), generator=generator)
        size = self.images.shape[-1]
        pad = recipe.crop
        padded = F.pad(self.images, (pad, pad, pad, pad))
        pixels = torch.arange(size)
        for indices in torch.split(order, recipe.batch):
            if len(indices) < 2:  # batch norm has no variance of one image
                continue
            shift = torch.randint(0, 2 * pad + 1, (2, len(indices), 1), generator=generator)
            columns = pixels.expand(len(indices), size)
            if recipe.flip:
                flipped = torch.rand(len(indices), 1, generator=generator) < 0.5
                columns = torch.where(flipped, size - 1 - columns, columns)
            rows = (pixels + shift[0]).to(padded.device)
            columns = (columns + shift[1]).to(padded.device)
            indices = indices.to(padded.device)  # noqa: PLW2901
            batch = padded[indices[:, None, None], :, rows[:, :, None], columns[:, None, :]]
            yield self.normalise(batch.permute(0, 3, 1, 2)), self.labels[indices]


@torch.no_grad()
def predict(network: nn.Module, images: Images) -> Tensor:
    """Return logits ``(N, classes)`` of all images, in order; computes in the surrounding autocast, if any."""
    network.eval()
    size = 1024 if images.images.is_cuda else 128
    return torch.cat([network(inputs) for inputs, _ in images.batches(size)])


def accuracy(logits: Tensor, images: Images) -> float:
    """Return the top-1 accuracy (0 to 1) of logits ``(N, classes)``."""
    return (logits.argmax(1) == images.labels).sum().item() / len(images)


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


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


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
) -> list[dict[str, float]]:
    """Train in place and leave the weights of the best epoch by validation accuracy in the network.

    Every epoch ends with a checkpoint in ``work.resume``; the random numbers of an epoch depend on the seed and
    the epoch alone, so that a continued run gives the same weights as an undisturbed one.

    Args:
        network: On ``hardware`` already.
        train: Training images.
        val: Validation images.
        recipe: Batch, momentum, weight decay, warm-up, augmentation.
        epochs: Passes over ``train``.
        base_lr: Learning rate for a batch of 128.
        seed: Of shuffling, augmentation and dropout.
        hardware: Where and in what to compute.
        work: For checkpoints and progress.
        loss: Called with logits ``(B, classes)`` float32, labels ``(B,)`` and inputs ``(B, 3, S, S)``.

    Returns:
        One entry an epoch: ``loss`` (mean) and ``val`` (accuracy).

    Raises:
        StageError: The loss is no longer a number.
    """
    steps_per_epoch = math.ceil(len(train) / recipe.batch)
    total = max(1, epochs * steps_per_epoch)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=base_lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
    )
    checkpoint = work.resume / "checkpoint.pt"
    history: list[dict[str, float]] = []
    best: dict[str, Any] = {"val": -1.0, "state": None}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=hardware.device, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        history, best = saved["history"], saved["best"]
        work.progress(len(history), epochs, f"continues after epoch {len(history)}")
    for epoch in range(len(history), epochs):
        seed_everything(seed * 100_003 + epoch)
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        network.train()
        mean = torch.zeros((), device=hardware.device)
        for step, (inputs, labels) in enumerate(train.augmented(recipe, generator)):
            rate = learning_rate(epoch * steps_per_epoch + step, total, recipe, base_lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with hardware.autocast():
                value = loss(network(inputs).float(), labels, inputs)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            mean += value.detach() / steps_per_epoch
        if not math.isfinite(mean.item()):
            raise StageError(
                f"the loss is no longer a number in epoch {epoch + 1}",
                f"lower the learning rate (recipe.lr is {recipe.lr:g}) in the profile",
            )
        with hardware.autocast():
            score = accuracy(predict(network, val), val)
        history.append({"loss": round(mean.item(), 6), "val": score})
        if score >= best["val"]:
            best = {"val": score, "state": {k: v.clone() for k, v in network.state_dict().items()}}
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
            "best": best,
        }
        with checkpoint.with_suffix(".new").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        checkpoint.with_suffix(".new").replace(checkpoint)
        work.progress(epoch + 1, epochs, f"loss {mean.item():.3f}, validation {score:.2%}")
    if best["state"] is not None:
        network.load_state_dict(best["state"])
    return history


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


def train(work: Work, data: Artifact, model: Model, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train the unpruned network; writes ``model.safetensors`` and ``test.logits.npy``.

    Returns:
        ``accuracy``, ``flops``, ``macs``, ``params`` and ``history``.
    """
    hardware = Hardware.find()
    seed_everything(seed)
    network = hardware.place(models.build(model, len(data.meta["classes"]), seed))
    history = fit(
        network,
        Images(datasets.load(data, "train").first(recipe.train_images), data.meta, hardware),
        Images(datasets.load(data, "val").first(recipe.val_images), data.meta, hardware),
        recipe=recipe,
        epochs=recipe.epochs,
        base_lr=recipe.lr,
        seed=seed,
        hardware=hardware,
        work=work,
    )
    state = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
    save_file(state, work.out / "model.safetensors")
    return measure(network, data, hardware, work.out) | {"history": history}


def load_baseline(baseline: Artifact, data: Artifact, model: Model) -> nn.Module:
    """Return the trained, unpruned network on the CPU."""
    network = models.build(model.model_copy(update={"weights": None}), len(data.meta["classes"]), seed=0)
    network.load_state_dict(load_file(baseline.file("model.safetensors")))
    return network


def finetune(
    work: Work, data: Artifact, model: Model, baseline: Artifact, pruned: Artifact, recipe: Recipe, seed: int
) -> dict[str, Any]:
    """Fine-tune the pruned network at half the learning rate; writes ``model.pth`` and ``test.logits.npy``.

    The baseline teaches it (soft targets) unless the recipe says otherwise. A network that was not pruned is
    kept as it is.

    Returns:
        ``accuracy``, ``flops``, ``macs``, ``params`` and ``history``.
    """
    hardware = Hardware.find()
    seed_everything(seed)
    classes = len(data.meta["classes"])
    network = hardware.place(models.restore(model, classes, pruned.file("model.pth")))
    history: list[dict[str, float]] = []
    if pruned.meta["pruned"]:
        loss: Loss = _cross_entropy
        if recipe.teacher:
            teacher = hardware.place(load_baseline(baseline, data, model)).eval()
            loss = _distillation(teacher, recipe.temperature)
        history = fit(
            network,
            Images(datasets.load(data, "train").first(recipe.train_images), data.meta, hardware),
            Images(datasets.load(data, "val").first(recipe.val_images), data.meta, hardware),
            recipe=recipe,
            epochs=recipe.finetune_epochs,
            base_lr=recipe.lr / 2,
            seed=seed,
            hardware=hardware,
            work=work,
            loss=loss,
        )
    result = measure(network, data, hardware, work.out) | {"history": history}
    models.save(network, work.out / "model.pth")
    return result
