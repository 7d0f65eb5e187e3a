"""Stands in for NVIDIA's ``cuda.bindings.runtime``: every call returns a tuple that begins with its error."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Any

import standin_gpu as gpu


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidDevice = 101
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


_OK, _INVALID = cudaError_t.cudaSuccess, cudaError_t.cudaErrorInvalidValue
_UNSUPPORTED = cudaError_t.cudaErrorStreamCaptureUnsupported
_pinned: dict[int, Any] = {}


def cudaSetDevice(device: int) -> tuple[cudaError_t]:
    return (_OK if device == 0 else cudaError_t.cudaErrorInvalidDevice,)


def cudaGetLastError() -> tuple[cudaError_t]:
    return (_OK,)


def cudaMalloc(size: int) -> tuple[cudaError_t, int | None]:
    if gpu.break_captures():
        return _UNSUPPORTED, None
    address = gpu.allocate(size)
    return (_OK if address else cudaError_t.cudaErrorMemoryAllocation), address


def cudaHostAlloc(size: int, flags: int) -> tuple[cudaError_t, int | None]:
    if gpu.break_captures():
        return _UNSUPPORTED, None
    buffer = ctypes.create_string_buffer(size)
    _pinned[ctypes.addressof(buffer)] = buffer
    return _OK, ctypes.addressof(buffer)


def cudaFree(address: int) -> tuple[cudaError_t]:
    gpu.free(address)
    return (_OK,)


def cudaFreeHost(address: int) -> tuple[cudaError_t]:
    del _pinned[address]
    return (_OK,)


def cudaMemcpyAsync(dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: int) -> tuple[cudaError_t]:
    on_gpu = {
        cudaMemcpyKind.cudaMemcpyHostToDevice: (True, False),
        cudaMemcpyKind.cudaMemcpyDeviceToHost: (False, True),
    }[kind]
    if (gpu.holds(dst, count), gpu.holds(src, count)) != on_gpu:
        return (_INVALID,)
    gpu.streams[stream].enqueue(lambda: ctypes.memmove(dst, src, count))
    return (_OK,)


def cudaStreamCreateWithFlags(flags: int) -> tuple[cudaError_t, int]:
    return _OK, gpu.Stream().handle


def cudaStreamDestroy(stream: int) -> tuple[cudaError_t]:
    del gpu.streams[stream]
    return (_OK,)


def cudaStreamSynchronize(stream: int) -> tuple[cudaError_t]:
    if gpu.streams[stream].captured is not None:
        gpu.break_captures()
        return (_UNSUPPORTED,)
    gpu.streams[stream].wait()
    return (_OK,)


def cudaStreamBeginCapture(stream: int, mode: cudaStreamCaptureMode) -> tuple[cudaError_t]:
    captured = gpu.streams[stream]
    if captured.captured is not None:
        return (_INVALID,)
    captured.captured, captured.broken = [], False
    return (_OK,)


def cudaStreamEndCapture(stream: int) -> tuple[cudaError_t, list[gpu.Work] | None]:
    captured = gpu.streams[stream]
    graph, captured.captured = captured.captured, None
    if graph is None:
        return _INVALID, None
    return (cudaError_t.cudaErrorStreamCaptureInvalidated, None) if captured.broken else (_OK, graph)


def cudaGraphInstantiate(graph: list[gpu.Work], flags: int) -> tuple[cudaError_t, tuple[gpu.Work, ...] | None]:
    return (_INVALID, None) if graph is None else (_OK, tuple(graph))


def cudaGraphDestroy(graph: list[gpu.Work]) -> tuple[cudaError_t]:
    graph.clear()
    return (_OK,)


def cudaGraphExecDestroy(graph_exec: tuple[gpu.Work, ...]) -> tuple[cudaError_t]:
    return (_OK,)


def cudaGraphLaunch(graph_exec: tuple[gpu.Work, ...], stream: int) -> tuple[cudaError_t]:
    for work in graph_exec:
        gpu.streams[stream].enqueue(work)
    return (_OK,)
