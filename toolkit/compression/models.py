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
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit import units
from toolkit.errors import StageError, UsageError
from toolkit.workload import TORCHVISION, Model


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


def build(model: Model, num_classes: int, seed: int, downloads: Path | None = None) -> nn.Module:
    """Build a network with freshly initialised or given weights.

    Args:
        model: Which network.
        num_classes: Width of its output; the classifier of a checkpoint with another number starts anew.
        seed: Seeds the initialisation; equal seeds give equal weights.
        downloads: Folder of torchvision's weights.

    Raises:
        UsageError: It cannot be imported or built, or the checkpoint does not fit.
        StageError: torchvision's weights cannot be downloaded.
    """
    network = _fresh(model, num_classes, seed)
    if model.weights == TORCHVISION:
        assert downloads is not None
        _load(network, _download(model.name, downloads), num_classes)
    elif model.checkpoint is not None:
        _load(network, model.checkpoint, num_classes)
    return network


def build_teacher(model: Model, num_classes: int) -> nn.Module:
    """Build a network that knows all the classes; raises UsageError where its checkpoint does not."""
    network = _fresh(model, num_classes, seed=0)
    assert model.checkpoint is not None
    _load(network, model.checkpoint, None)
    return network


def _fresh(model: Model, num_classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if model.source == "built-in":
        network: nn.Module = ResNet20(num_classes)
    elif model.source == "torchvision":
        network = _from_torchvision(model.name, num_classes)
    else:
        network = _from_factory(model.name, num_classes)
    return network


def _download(name: str, downloads: Path) -> Path:
    """Return the file of torchvision's best weights for a model, downloaded once."""
    from torchvision import models

    url = models.get_model_weights(name).DEFAULT.url
    path = downloads / Path(url).name
    if not path.exists():
        try:
            torch.hub.load_state_dict_from_url(url, str(downloads), progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise StageError(
                f"torchvision's weights of {name} cannot be downloaded: {str(error).splitlines()[0]}",
                f"bring {url} to {downloads}, or give a checkpoint of your own",
            ) from error
    return path


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


def _load(network: nn.Module, path: Path, classes: int | None) -> None:
    """Load a safetensors file or a state dict (also under ``state_dict`` or ``model``); tensors only, no code.

    Args:
        network: Where to.
        path: The file.
        classes: Tensors of so many rows may have another number of them in the file, and are then left as they
            are; None where everything has to fit.
    """
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
    own = network.state_dict()
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if classes is not None:  # auxiliary heads are for training from nothing
        state = {key: value for key, value in state.items() if key in own or not key.lower().startswith("aux")}
    for key, tensor in own.items():
        if key in state and tensor.shape[:1] == (classes,) != state[key].shape[:1]:
            state[key] = tensor
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


def check(network: nn.Module, name: str, size: int, num_classes: int, small: int | None = None) -> None:
    """Make sure that a network takes ``(2, 3, size, size)`` and returns ``(2, num_classes)``.

    Args:
        network: That is to be used.
        name: What it is called in a message.
        size: Side of the images.
        num_classes: Of the data.
        small: Side of other images that it has to take besides, or None.

    Raises:
        UsageError: It does not.
    """
    network.eval()
    output = _output(network, name, size, "set input_size in the profile to what the model takes")
    if small is not None:
        _output(network, name, small, "leave recipe.small_crops out of the profile: the model takes only one size")
    if not isinstance(output, Tensor) or tuple(output.shape) != (2, num_classes):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(
            f"the model '{name}' returns {shape} for two images, instead of (2, {num_classes})",
            f"it has to return one logit a class; the data have {num_classes} classes",
        )


def _output(network: nn.Module, name: str, size: int, remedy: str) -> object:
    try:
        with torch.no_grad():
            return network(torch.zeros(2, 3, size, size))
    except Exception as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"the model '{name}' does not accept images of 3×{size}×{size}: {why}", remedy) from error


def save(network: nn.Module, path: Path) -> None:
    """Save weights, for FastNAS's networks together with Model Optimizer's record of what was done to them."""
    import modelopt.torch.opt as mto
    from modelopt.torch.opt.conversion import ModeloptStateManager

    if ModeloptStateManager.is_converted(network):
        mto.save(network.cpu(), path)
    else:
        torch.save(network.cpu().state_dict(), path)


def restore(model: Model, num_classes: int, path: Path) -> nn.Module:
    """Rebuild a network that :func:`save` wrote, pruned or not."""
    import modelopt.torch.opt as mto

    network = _fresh(model, num_classes, seed=0)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if "modelopt_state" in saved:
            network, saved = (
                mto.restore_from_modelopt_state(network, saved["modelopt_state"]),
                saved["model_state_dict"],
            )
        else:
            _resize(network, saved)
        network.load_state_dict(saved)
    except Exception as error:
        raise StageError(
            f"the network in {path} cannot be restored: {type(error).__name__}: {error}",
            "if the model's code or Model Optimizer changed since, run again with --rerun",
        ) from error
    return network


def _resize(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a network's layers the widths that a state dict of the same network, pruned, has."""
    for name, layer in network.named_modules():
        for key, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            saved = state.get(f"{name}.{key}" if name else key, tensor)  # some buffers are not saved
            if saved.shape != tensor.shape:
                tensor.data = torch.empty_like(saved)
        if isinstance(layer, nn.Conv2d):
            channels, inputs = layer.weight.shape[:2]
            if layer.groups == layer.in_channels > 1:  # depthwise: so many channels out of each
                layer.groups = channels * layer.in_channels // layer.out_channels
            layer.out_channels, layer.in_channels = channels, inputs * layer.groups
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            layer.num_features = len(layer.running_mean)
        elif isinstance(layer, nn.LayerNorm) and layer.weight is not None:
            layer.normalized_shape = tuple(layer.weight.shape)


def parameters(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
