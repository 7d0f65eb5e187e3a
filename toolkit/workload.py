"""What a user gives to a run: which data, which network, and what an ONNX file expects of its pixels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from toolkit import units
from toolkit.config import DATA_KINDS, Strict
from toolkit.errors import UsageError

DATA_NAMES = ["digits", "cifar10", "imagefolder:PATH", "inputs:FILE.npy", "none"]
_DATA_SYNTAX = {name.partition(":")[0]: name for name in DATA_NAMES}

BUILT_IN_MODELS = ("resnet20",)
TORCHVISION = "torchvision"  # the value of --weights that means its own
MODEL_NAMES = [*BUILT_IN_MODELS, "torchvision:NAME", "package.module:factory", "onnx:FILE"]


class Data(Strict):
    """Which data: a labelled set, the user's own inputs without labels, or none (seeded random inputs).

    Attributes:
        content: Hash of an image folder that lies on another machine.
    """

    kind: str
    path: str | None = None
    skip_bad_images: bool = False
    content: str | None = None

    @classmethod
    def parse(cls, text: str, *, skip_bad_images: bool = False) -> Data:
        """Read the value of ``--data``."""
        kind, _, path = text.partition(":")
        if kind not in _DATA_SYNTAX or bool(path) != (":" in _DATA_SYNTAX[kind]):
            hint = f"write {_DATA_SYNTAX[kind]}" if kind in _DATA_SYNTAX else units.nearest(kind, DATA_NAMES)
            raise UsageError(f"no data set is called '{text}'", hint)
        return cls(kind=kind, path=path or None, skip_bad_images=skip_bad_images)

    @property
    def labelled(self) -> bool:
        """Whether the images have classes, to train on and to measure accuracy with."""
        return self.kind in DATA_KINDS

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}" if self.path else self.kind


class Normalization(Strict):
    """What an ONNX file expects of its pixels: ``(pixel / 255 - mean) / std``, one number or one a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def parse(cls, mean: str | None, std: str | None, input_range: str | None) -> Normalization | None:
        """Read ``--mean`` and ``--std``, or ``--input-range``; None where none of them is given."""
        if input_range is not None:
            if mean is not None or std is not None:
                raise UsageError("--input-range stands beside --mean or --std", "give the range, or mean and std")
            low, high = (float(end) for end in input_range.split(","))
            return cls(mean=(-low / (high - low),), std=(1 / (high - low),))
        if mean is None and std is None:
            return None
        if mean is None or std is None:
            raise UsageError("--mean and --std go together", "give both, or --input-range instead")
        found = cls(mean=_numbers("--mean", mean), std=_numbers("--std", std))
        if not all(0 <= value <= 1 for value in found.mean) or not all(0 < value <= 1 for value in found.std):
            raise UsageError(
                f"--mean {mean} --std {std} are not of pixel values between 0 and 1", "divide both by 255"
            )
        return found


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3):
        raise UsageError(f"{option} {text} is not one number or three", f"write {option} 0.485,0.456,0.406")
    return values


class Model(Strict):
    """Which network: ``resnet20``, ``torchvision:NAME``, the user's ``package.module:factory`` or ``onnx:FILE``."""

    source: Literal["built-in", "torchvision", "factory", "onnx"]
    name: str
    weights: str | None = None
    normalization: Normalization | None = None

    @classmethod
    def parse(cls, text: str, weights: str | None = None, normalization: Normalization | None = None) -> Model:
        """Read the value of ``--model`` and what goes with it."""
        head, colon, tail = text.partition(":")
        if head == "onnx" and tail:
            path = Path(tail).expanduser()
            if not path.is_file():
                raise UsageError(
                    f"the ONNX file '{tail}' does not exist", "give --model onnx:FILE an existing file"
                )
            if weights is not None:
                raise UsageError("an ONNX file brings its own weights", "leave out --weights")
            return cls(source="onnx", name=str(path), normalization=normalization)
        if normalization is not None:
            raise UsageError(
                "--mean, --std and --input-range are for an ONNX file; any other model's are those of its data",
                "leave them out",
            )
        if weights == TORCHVISION:
            if head != "torchvision":
                raise UsageError(f"torchvision has no weights of '{text}'", "give --weights FILE")
        elif weights is not None and not Path(weights).is_file():
            raise UsageError(f"the checkpoint '{weights}' is not a file", "give --weights an existing file")
        if text in BUILT_IN_MODELS:
            return cls(source="built-in", name=text, weights=weights)
        if head == "torchvision" and tail:
            return cls(source="torchvision", name=tail, weights=weights)
        if colon and re.fullmatch(r"[A-Za-z_][\w.]*", head) and re.fullmatch(r"[A-Za-z_]\w*", tail):
            return cls(source="factory", name=text, weights=weights)
        raise UsageError(f"no model is called '{text}'", units.nearest(text, MODEL_NAMES))

    @classmethod
    def parse_teacher(cls, text: str) -> Model:
        """Read the value of ``--teacher``, ``MODEL[=FILE]``: a model, trained first without a checkpoint."""
        name, given, file = text.partition("=")
        if name.startswith("onnx:"):
            raise UsageError(
                "an ONNX file cannot teach", "give the PyTorch model, with its checkpoint if it has one"
            )
        if given and not Path(file).is_file():
            raise UsageError(
                f"the teacher's checkpoint '{file}' is not a file",
                "write --teacher MODEL=FILE, or --teacher MODEL for one that is trained first",
            )
        return cls.parse(name, file or (TORCHVISION if name.startswith(f"{TORCHVISION}:") else None))

    @property
    def checkpoint(self) -> Path | None:
        """The user's own weights; None where there are none, or torchvision's."""
        return None if self.weights in (None, TORCHVISION) else Path(str(self.weights))

    @property
    def trainable(self) -> bool:
        """Whether there is a network to train and prune; an ONNX file is taken as it is."""
        return self.source != "onnx"

    def __str__(self) -> str:
        if self.source == "onnx":
            return f"onnx:{Path(self.name).name}"  # a release is the same wherever the file lies
        return f"torchvision:{self.name}" if self.source == "torchvision" else self.name
