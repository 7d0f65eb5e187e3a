"""What `toolkit init` writes: small enough to read at a glance, and it runs as it stands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from toolkit.errors import UsageError

_TARGET = """\
description: my device; this machine until you change runtime and build
profile: my-profile
runtime: onnxruntime
threads: 1
"""

_PROFILE = """\
description: a first budget and contract; every key is explained in the toolkit's profiles/README.md
input_size: 32
flops: 70%
channel_divisor: 8
precision: fp32
recipe:
  epochs: 20
  finetune_epochs: 10
  batch: 16
contract:
  latency_p99: 20 ms
  max_accuracy_drop: 10 %
"""

_MODEL = '''\
"""A small network of my own: takes float images (N, 3, S, S) and returns logits (N, num_classes)."""

from torch import nn


def block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def build(num_classes: int) -> nn.Module:
    return nn.Sequential(
        block(3, 16, 1),
        block(16, 32, 2),
        block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )
'''

_IMAGES = """\
train/<class>/*   images to learn from, any size, grey or colour
test/<class>/*    images to judge by; never seen by training, search or calibration

The red discs and blue squares here are drawn by `toolkit init`, so that the first run works.
Put your own in their place.
"""


def write(folder: Path) -> list[Path]:
    """Write the starter; refuses to overwrite anything.

    Returns:
        What was written: files, and the folder of images.

    Raises:
        UsageError: Something of that name is there already.
    """
    files = {
        folder / "targets" / "my-device.yaml": _TARGET,
        folder / "profiles" / "my-profile.yaml": _PROFILE,
        folder / "my_model.py": _MODEL,
        folder / "images" / "README.txt": _IMAGES,
    }
    for path in files:
        if path.exists():
            raise UsageError(f"{path} is there already", "choose another folder, or remove it")
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        for path in _draw(folder / "images"):
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write {error.filename}: {error.strerror}", "choose a folder of your own"
        ) from error
    return list(files)


def _draw(folder: Path) -> Iterator[Path]:
    """Draw 40 red discs and 40 blue squares to learn from, 20 of each to judge by; yields each folder first."""
    import random

    from PIL import Image, ImageDraw

    dice = random.Random(1)
    for split, count in (("train", 40), ("test", 20)):
        for shape in ("disc", "square"):
            yield folder / split / shape / "any"
            for index in range(count):
                image = Image.new("RGB", (48, 48), tuple(dice.randrange(90) for _ in range(3)))
                radius, x, y = dice.randrange(9, 16), dice.randrange(17, 31), dice.randrange(17, 31)
                box = (x - radius, y - radius, x + radius, y + radius)
                strong, weak = dice.randrange(170, 256), dice.randrange(80, 150)
                colour = (strong, weak, weak) if shape == "disc" else (weak, weak, strong)
                pen = ImageDraw.Draw(image)
                (pen.ellipse if shape == "disc" else pen.rectangle)(box, fill=colour)
                image.save(folder / split / shape / f"{index:02d}.png")
