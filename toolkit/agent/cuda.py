"""The little of CUDA that running an engine takes, through cuda-python or PyCUDA, whichever the device has."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from .protocol import Refusal


def _refusal(reason: str) -> Refusal:
    if "out of memory" in reason or "MemoryAllocation" in reason:
        return Refusal("the GPU has not enough memory: {}".format(reason), "stop what else runs on the device")
    return Refusal(
        "CUDA does not work here: {}".format(reason),
        "check the driver with nvidia-smi; in a container ask for the GPU",
    )


class CudaPython:
    """NVIDIA's cuda-python: ``cuda.bindings.runtime``, in older releases ``cuda.cudart``."""

    name = "cuda-python"

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            from cuda import cudart as runtime
        self._cuda = runtime
        self._release: list[Callable[[], Any]] = []
        self._call(runtime.cudaSetDevice(0))
        self.stream = int(
            self._call(runtime.cudaStreamCreateWithFlags(1))
        )  # 1: does not wait for the default stream
        self._keep(runtime.cudaStreamDestroy, self.stream)

    def __enter__(self) -> None:
        """Do nothing: CUDA's runtime makes a context current wherever it is called."""

    def __exit__(self, *problem: object) -> None:
        """Do nothing."""

    def _call(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if int(error) != 0:
            raise _refusal(getattr(error, "name", str(error)))
        return values[0] if values else None

    def _keep(self, release: Callable[[Any], Any], what: Any) -> None:
        self._release.append(lambda: release(what))

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes on the GPU."""
        address = int(self._call(self._cuda.cudaMalloc(size)))
        self._keep(self._cuda.cudaFree, address)
        return address

    def pinned(self, size: int) -> np.ndarray:
        """Return ``size`` bytes (uint8) of page-locked host memory, which copies at full speed."""
        address = int(self._call(self._cuda.cudaHostAlloc(size, 0)))
        self._keep(self._cuda.cudaFreeHost, address)
        memory: np.ndarray = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return memory

    def to_gpu(self, address: int, source: np.ndarray) -> None:
        """Enqueue a copy to the GPU."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync(address, source.ctypes.data, source.nbytes, kind, self.stream))

    def to_host(self, destination: np.ndarray, address: int) -> None:
        """Enqueue a copy from the GPU."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(
            self._cuda.cudaMemcpyAsync(destination.ctypes.data, address, destination.nbytes, kind, self.stream)
        )

    def synchronize(self) -> None:
        """Wait for what was enqueued."""
        self._call(self._cuda.cudaStreamSynchronize(self.stream))

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None] | None:
        """Return a function that replays what ``enqueue`` does as one CUDA graph, or None where that fails."""
        cuda = self._cuda
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            self._call(cuda.cudaStreamBeginCapture(self.stream, mode))
            try:
                enqueue()
            finally:
                graph = self._call(cuda.cudaStreamEndCapture(self.stream))
            self._keep(cuda.cudaGraphDestroy, graph)
            executable = self._call(cuda.cudaGraphInstantiate(graph, 0))
            self._keep(cuda.cudaGraphExecDestroy, executable)
        except (Refusal, TypeError):  # CUDA 11's bindings want other arguments
            cuda.cudaGetLastError()
            return None
        launch, stream, call = cuda.cudaGraphLaunch, self.stream, self._call
        return lambda: call(launch(executable, stream))

    def close(self) -> None:
        """Give back memory, graphs and stream; nothing of them may be in use."""
        while self._release:
            self._release.pop()()


class PyCuda:
    """PyCUDA, which has no CUDA graphs."""

    name = "pycuda"

    def __init__(self) -> None:
        from pycuda import driver

        self._driver = driver
        self._call(driver.init)
        self._context = self._call(driver.Device, 0).retain_primary_context()
        self._allocations: list[Any] = []
        with self:
            self._stream = self._call(driver.Stream)
        self.stream = int(self._stream.handle)

    def __enter__(self) -> None:
        """Make the context current in this thread, which every other method needs."""
        self._context.push()

    def __exit__(self, *problem: object) -> None:
        self._context.pop()

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._driver.Error as error:
            raise _refusal(str(error)) from error

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes on the GPU."""
        self._allocations.append(self._call(self._driver.mem_alloc, size))
        return int(self._allocations[-1])

    def pinned(self, size: int) -> np.ndarray:
        """Return ``size`` bytes (uint8) of page-locked host memory, which copies at full speed."""
        memory: np.ndarray = self._call(self._driver.pagelocked_empty, size, np.uint8)
        return memory

    def to_gpu(self, address: int, source: np.ndarray) -> None:
        """Enqueue a copy to the GPU."""
        self._call(self._driver.memcpy_htod_async, address, source, self._stream)

    def to_host(self, destination: np.ndarray, address: int) -> None:
        """Enqueue a copy from the GPU."""
        self._call(self._driver.memcpy_dtoh_async, destination, address, self._stream)

    def synchronize(self) -> None:
        """Wait for what was enqueued."""
        self._call(self._stream.synchronize)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None] | None:
        """Return None: PyCUDA cannot replay a CUDA graph."""
        del enqueue
        return None

    def close(self) -> None:
        """Give back memory and stream; nothing of them may be in use."""
        self._allocations.clear()
        del self._stream


def start() -> CudaPython | PyCuda:
    """Return CUDA on the first GPU.

    Raises:
        Refusal: Neither library is here, or there is no GPU that works.
    """
    problem = None
    for library in (CudaPython, PyCuda):
        try:
            return library()
        except ImportError:
            continue
        except Refusal as refusal:  # cuda-python of a newer CUDA than the driver's, say
            problem = problem or refusal
    raise problem or Refusal(
        "neither cuda-python nor pycuda can be imported by this Python",
        "python3 -m pip install cuda-python, of the major version of the device's CUDA",
    )


def available() -> bool:
    """Tell whether one of the two libraries can be imported."""
    from importlib import util

    return util.find_spec("cuda") is not None or util.find_spec("pycuda") is not None
