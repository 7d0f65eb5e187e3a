"""What is copied to a device, a block at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

BLOCK = 1 << 20  # bytes that are read, sent and reported at once


@contextmanager
def opened(source: Path | bytes) -> Iterator[BinaryIO]:
    """Open a file, or bytes as if they were one."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        yield file


def blocks(file: BinaryIO, progress: Callable[[int], None] = lambda count: None) -> Iterator[bytes]:
    """Yield the rest of a file in blocks; ``progress`` hears of each block's length once it has been taken."""
    while block := file.read(BLOCK):
        yield block
        progress(len(block))
