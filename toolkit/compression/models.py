"""Networks: the built-in ResNet20, torchvision's, and the user's own; built, checked, saved, restored."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit import units
from toolkit.config import Model
from toolkit.errors import StageError, UsageError


class _ZeroPaddedShortcut(nn.Module):
    """Identity for a block that halves the image and widens the channels (He 2015, option A)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (channels_out - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class _BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        same = stride == 1 and channels_in == channels_out
        self.shortcut = nn.Identity() if same else _ZeroPaddedShortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet20(nn.Module):
    """ResNet20 for small images: ``(N, 3, S, S)`` float to ``(N, num_classes)`` logits.

    Stages of 16, 32 and 64 channels, zero-padded shortcuts, Kaiming initialisation
    (He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2).
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        stages = []
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            blocks = []
            for block in range(3):
                blocks.append(_BasicBlock(channels, width, stride if block == 0 else 1))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.fc(torch.flatten(self.pool(out), 1))
        return logits


def build(model: Model, num_classes: int, seed: int) -> nn.Module:
    """Build a network with freshly initialised or given weights.

    Args:
        model: Which network.
        num_classes: Width of its output.
        seed: Seeds the initialisation; equal seeds give equal weights.

    Raises:
        UsageError: It cannot be imported or built, or the checkpoint does not fit.
    """
    torch.manual_seed(seed)
    if model.source == "built-in":
        network: nn.Module = ResNet20(num_classes)
    elif model.source == "torchvision":
        network = _from_torchvision(model.name, num_classes)
    else:
        network = _from_factory(model.name, num_classes)
    if model.weights is not None:
        _load_checkpoint(network, Path(model.weights))
    return network


def _from_torchvision(name: str, num_classes: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UsageError(f"torchvision has no classification model '{name}'", units.nearest(name, known))
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    network = models.get_model(name, weights=None, num_classes=num_classes, **extra)
    assert isinstance(network, nn.Module)
    return network


def _from_factory(name: str, num_classes: int) -> nn.Module:
    module_name, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"the model module '{module_name}' does not import: {type(error).__name__}: {error}",
            "correct it, or run where what it needs is installed",
        ) from error
    factory = getattr(module, function, None)
    if not callable(factory):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"'{module_name}' has no function '{function}'", units.nearest(function, callables))
    try:
        wants_classes = "num_classes" in inspect.signature(factory).parameters
        network = factory(num_classes=num_classes) if wants_classes else factory()
    except Exception as error:
        raise UsageError(
            f"the model factory '{name}' failed: {type(error).__name__}: {error}",
            "it is called as factory(num_classes=N), or as factory() when it takes no num_classes",
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"the model factory '{name}' returned {type(network).__name__}, not a torch.nn.Module",
            "return the network itself",
        )
    return network


def _load_checkpoint(network: nn.Module, path: Path) -> None:
    """Load a safetensors file or a state dict (also under ``state_dict`` or ``model``); tensors only, no code."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(
            f"the checkpoint {path} cannot be read: {str(error).splitlines()[0]}",
            "give a safetensors file or a state dict saved with torch.save(model.state_dict(), FILE)",
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"the checkpoint {path} is not a table of tensors", "save model.state_dict() to it")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    own = network.state_dict()
    problems = [f"'{key}' is missing" for key in own if key not in state]
    problems += [f"'{key}' is not in the model" for key in state if key not in own]
    problems += [
        f"'{key}' is {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UsageError(
            f"the checkpoint {path} does not fit the model: {'; '.join(problems[:3])}{more}",
            "give the checkpoint of this model with this many classes",
        )
    network.load_state_dict(state)


def check(network: nn.Module, name: str, size: int, num_classes: int) -> None:
    """Make sure that a network takes ``(2, 3, size, size)`` and returns ``(2, num_classes)``.

    Raises:
        UsageError: It does not.
    """
    network.eval()
    try:
        with torch.no_grad():
            output = network(torch.zeros(2, 3, size, size))
    except Exception as error:
        raise UsageError(
            f"the model '{name}' does not accept images of 3×{size}×{size}: {str(error).splitlines()[0]}",
            "set input_size in the profile to what the model takes",
        ) from error
    if not isinstance(output, Tensor) or tuple(output.shape) != (2, num_classes):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(
            f"the model '{name}' returns {shape} for two images, instead of (2, {num_classes})",
            f"it has to return one logit a class; the data have {num_classes} classes",
        )


def save(network: nn.Module, path: Path) -> None:
    """Save weights together with Model Optimizer's record of what was done to the network."""
    import modelopt.torch.opt as mto

    mto.save(network.cpu(), path)


def restore(model: Model, num_classes: int, path: Path) -> nn.Module:
    """Rebuild a network that :func:`save` wrote, pruned or not."""
    import modelopt.torch.opt as mto

    network = build(model.model_copy(update={"weights": None}), num_classes, seed=0)
    try:
        restored = mto.restore(network, path)
    except Exception as error:
        raise StageError(
            f"the network in {path} cannot be restored: {type(error).__name__}: {error}",
            "if the model's code or Model Optimizer changed since, run again with --rerun",
        ) from error
    assert isinstance(restored, nn.Module)
    return restored


def parameters(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
