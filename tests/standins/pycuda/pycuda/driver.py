"""Stands in for ``pycuda.driver``: objects, and exceptions where cuda-python returns an error."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import standin_gpu as gpu


class Error(Exception):
    pass


class LogicError(Error):
    pass


class MemoryError(Error):
    pass


_state = {"initialized": False}
_thread = threading.local()


def init() -> None:
    _state["initialized"] = True


class Context:
    def push(self) -> None:
        _thread.contexts = getattr(_thread, "contexts", 0) + 1

    @staticmethod
    def pop() -> None:
        _require_context("cuCtxPopCurrent")
        _thread.contexts -= 1


class Device:
    def __init__(self, number: int) -> None:
        if not _state["initialized"]:
            raise LogicError("cuDeviceGet failed: initialization error")
        if number != 0:
            raise LogicError("cuDeviceGet failed: invalid device ordinal")

    def retain_primary_context(self) -> Context:
        return Context()


def _require_context(call: str) -> None:
    if not getattr(_thread, "contexts", 0):
        raise LogicError(f"{call} failed: invalid device context")


class Stream:
    def __init__(self, flags: int = 0) -> None:
        _require_context("cuStreamCreate")
        self._stream = gpu.Stream()
        self.handle = self._stream.handle

    def synchronize(self) -> None:
        self._stream.wait()


class DeviceAllocation:
    def __init__(self, address: int) -> None:
        self._address = address

    def __int__(self) -> int:
        return self._address

    def __del__(self) -> None:
        gpu.free(self._address)


def mem_alloc(size: int) -> DeviceAllocation:
    _require_context("cuMemAlloc")
    address = gpu.allocate(size)
    if address is None:
        raise MemoryError("cuMemAlloc failed: out of memory")
    return DeviceAllocation(address)


def pagelocked_empty(shape: int, dtype: type, order: str = "C", mem_flags: int = 0) -> np.ndarray:
    _require_context("cuMemHostAlloc")
    return np.empty(shape, dtype, order)


def memcpy_htod_async(dest: int, src: np.ndarray, stream: Stream) -> None:
    _require_context("cuMemcpyHtoDAsync")
    if not gpu.holds(dest, src.nbytes):
        raise LogicError("cuMemcpyHtoDAsync failed: invalid argument")
    gpu.streams[stream.handle].enqueue(lambda: ctypes.memmove(dest, src.ctypes.data, src.nbytes))


def memcpy_dtoh_async(dest: np.ndarray, src: int, stream: Stream) -> None:
    _require_context("cuMemcpyDtoHAsync")
    if not gpu.holds(src, dest.nbytes):
        raise LogicError("cuMemcpyDtoHAsync failed: invalid argument")
    gpu.streams[stream.handle].enqueue(lambda: ctypes.memmove(dest.ctypes.data, src, dest.nbytes))
