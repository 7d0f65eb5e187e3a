"""TensorRT and TensorRT for RTX: two modules with one API, what they log, and what a plan says of itself."""

from __future__ import annotations

import importlib
import re
import struct
from collections.abc import Callable
from typing import Any

from .protocol import OutOfMemory, Refusal

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
_REMEDIES = {
    "tensorrt": "on a Jetson: apt-get install python3-libnvinfer; elsewhere build in the container",
    "tensorrt-rtx": "python3 -m pip install tensorrt-rtx-cu13",
}
_HEADER = 28  # bytes of a plan up to and with its version (TensorRT 8.6 and newer; TensorRT for RTX)
_MEMORY = re.compile(r"insufficient memory|out ?of ?memory|memoryallocation", re.IGNORECASE)


def name(runtime: str) -> str:
    """Return a runtime's name for people."""
    return _NAMES[runtime]


def module(runtime: str) -> Any:
    """Import a runtime's Python bindings.

    Raises:
        Refusal: They are not installed, or do not load.
    """
    try:
        return importlib.import_module(MODULES[runtime])
    except ImportError as error:
        message = "{} cannot be imported by this Python: {}".format(_NAMES[runtime], error)
        raise Refusal(message, _REMEDIES[runtime]) from error


class Log:
    """Keeps the errors and warnings that TensorRT logs: its calls only return None.

    TensorRT registers the first logger of a process for good, so there is one for each module.
    """

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        log = self

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                    log.errors.append(message)
                elif severity == trt.ILogger.Severity.WARNING:
                    log.warnings.append(message)

        self.logger = Logger()

    @classmethod
    def of(cls, trt: Any) -> Log:
        """Return the module's log, emptied."""
        if trt.__name__ not in _LOGS:
            _LOGS[trt.__name__] = cls(trt)
        log = _LOGS[trt.__name__]
        log.errors.clear()
        log.warnings.clear()
        return log

    def last(self) -> str:
        """Return the error that says most: the first one, without TensorRT's source positions."""
        text = self.errors[0] if self.errors else "it gave no reason"
        return re.sub(r"\s*\(?In \w+ at \S+\)?|^.*?Error Code \d+: ", "", text.splitlines()[0]).strip()

    def node(self) -> tuple[str, str]:
        """Return name and operator of the node that the parser stopped at: TensorRT 8 tells them here alone."""
        text = "\n".join(self.errors)
        operator = re.search(r"While parsing node number \d+ \[(\w+) ->", text)
        node = re.search(r'^name: "(.+)"$', text, re.MULTILINE)
        return node.group(1) if node else "", operator.group(1) if operator else ""

    def raise_memory(self) -> None:
        """Raise OutOfMemory when memory was what was missing."""
        for text in self.errors + self.warnings:
            if _MEMORY.search(text):
                raise OutOfMemory(text.splitlines()[0][:200])


_LOGS: dict[str, Log] = {}


def profiler(trt: Any, report: Callable[[str, float], None]) -> Any:
    """Return a profiler for an execution context; ``report`` is told each layer's name and milliseconds."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            report(layer_name, ms)

    return Profiler()


def plan_version(plan: bytes) -> str | None:
    """Return the version with build number that wrote a plan, or None where the plan does not say.

    Bytes 24 to 27 of the header are major, minor, patch and build (TensorRT's ``trtexec --getPlanVersionOnly``).
    """
    if len(plan) < _HEADER or plan[1:4] != b"trt":
        return None
    return ".".join(str(part) for part in struct.unpack_from("4B", plan, _HEADER - 4))
