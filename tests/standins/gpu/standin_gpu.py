"""A GPU made of host memory, shared by the stand-ins for CUDA and for TensorRT.

Work is done when its stream is waited for and not before, and fresh memory holds rubbish: who forgets to wait, or
to copy, reads nonsense.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

Work = Callable[[], object]


class Stream:
    """Work in order; while it is captured, work goes to the graph instead."""

    def __init__(self) -> None:
        self.handle = next(_handles)
        self.pending: list[Work] = []
        self.captured: list[Work] | None = None
        self.broken = False
        streams[self.handle] = self

    def enqueue(self, work: Work) -> None:
        (self.pending if self.captured is None else self.captured).append(work)

    def wait(self) -> None:
        pending, self.pending = self.pending, []
        for work in pending:
            work()


_handles = itertools.count(0x1000)
_memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
streams: dict[int, Stream] = {}
capacity = 1 << 30


def allocate(size: int) -> int | None:
    """Return the address of new memory; None where it does not suffice."""
    if size + sum(len(buffer) for buffer in _memory.values()) > capacity:
        return None
    buffer = ctypes.create_string_buffer(b"\xa5" * size, size)
    address = ctypes.addressof(buffer)
    _memory[address] = buffer
    return address


def free(address: int) -> None:
    del _memory[address]


def holds(address: int, size: int) -> bool:
    """Tell whether a range lies within one allocation."""
    return any(start <= address and address + size <= start + len(buffer) for start, buffer in _memory.items())


def break_captures() -> bool:
    """Invalidate every capture under way, as a call does that none may hold; tells whether there was one."""
    capturing = [stream for stream in streams.values() if stream.captured is not None]
    for stream in capturing:
        stream.broken = True
    return bool(capturing)
