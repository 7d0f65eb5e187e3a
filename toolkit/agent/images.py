"""An image file as a network takes it: training, host and device read it with this code, and see the same bytes."""

from __future__ import annotations

import io
import re
from typing import BinaryIO, Union

import numpy as np

from .protocol import Refusal

Source = Union[str, bytes]  # a file's path, or what stands in it
_NPY = b"\x93NUMPY"
_NETPBM = re.compile(rb"P([56])" + rb"(?:\s|#[^\n]*\n)+(\d+)" * 3 + rb"\s")


class BadImage(Refusal, ValueError):  # noqa: N818
    """What was given is no image, or none that can be read here."""


def read(source: Source, size: int, name: str = "sent") -> np.ndarray:
    """Return an image as uint8 ``(3, size, size)``, RGB.

    Pillow decodes it, converts it to RGB and scales it bilinearly. Without Pillow there are still binary PPM and
    PGM of just that size. An array saved by ``numpy.save`` is taken as it is.

    Args:
        source: Path or content of the file.
        size: Edge length in pixels.
        name: What messages call the content; a path they call as it is.

    Raises:
        BadImage: It cannot be read.
    """
    name = source if isinstance(source, str) else name
    try:
        with _opened(source) as file:
            if file.read(len(_NPY)) == _NPY:
                return _array(source, size, name)
    except OSError as error:
        raise _corrupt(name, error) from error
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        return _netpbm(source, size, name)
    try:
        with Image.open(source if isinstance(source, str) else io.BytesIO(source)) as file:
            image = file.convert("RGB")
    except UnidentifiedImageError as error:  # of content it says the address in memory
        raise _corrupt(name, "cannot identify image file {!r}".format(name)) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _corrupt(name, error) from error
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _opened(source: Source) -> BinaryIO:
    return open(source, "rb") if isinstance(source, str) else io.BytesIO(source)


def _corrupt(name: str, reason: object) -> BadImage:
    return BadImage("the image {} is corrupt: {}".format(name, reason))


def _array(source: Source, size: int, name: str) -> np.ndarray:
    try:
        with _opened(source) as file:
            pixels: np.ndarray = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _corrupt(name, error) from error
    if pixels.dtype != np.uint8 or pixels.shape != (3, size, size):
        raise BadImage(
            "the array {} is {} {}".format(name, pixels.dtype, pixels.shape),
            "save one image, uint8 (3, {0}, {0})".format(size),
        )
    return pixels


def _netpbm(source: Source, size: int, name: str) -> np.ndarray:
    """Read binary PPM or PGM with 8 bits a channel."""
    with _opened(source) as file:
        content = file.read()
    header = _NETPBM.match(content)
    if header is None or header.groups()[1:] != (b"%d" % size, b"%d" % size, b"255"):
        raise BadImage(
            "this Python has no Pillow, and without it {} cannot be read".format(name),
            "`toolkit provision TARGET` brings Pillow; without it, send binary PPM or PGM of "
            "{0} x {0} pixels with 8 bits a channel".format(size),
        )
    channels = 3 if header.group(1) == b"6" else 1
    pixels = np.frombuffer(content, np.uint8, offset=header.end())
    if len(pixels) < size * size * channels:
        raise _corrupt(name, "it is truncated")
    pixels = pixels[: size * size * channels].reshape(size, size, channels)
    return np.ascontiguousarray(np.broadcast_to(pixels, (size, size, 3)).transpose(2, 0, 1))
