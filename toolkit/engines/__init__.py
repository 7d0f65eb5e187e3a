"""Runtimes behind one small interface: which Q/DQ they take, and how an engine of theirs is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from toolkit import units
from toolkit.config import Precision, Target
from toolkit.devices.agent import Agent
from toolkit.errors import StageError, UsageError
from toolkit.store import Artifact, Work

Build = Callable[[Work, Artifact, Target, Agent, Precision, int], dict[str, Any]]


@dataclass(frozen=True)
class Runtime:
    """What the pipeline has to know of a runtime.

    Attributes:
        spelling: The Q/DQ that it takes.
        precisions: What it computes in.
        build: Builds an engine; None where this version cannot.
    """

    spelling: Literal["onnxruntime", "tensorrt"]
    precisions: tuple[Precision, ...]
    build: Build | None


def find(name: str) -> Runtime:
    """Return a runtime by name."""
    from toolkit.engines import onnxruntime

    return {
        "onnxruntime": Runtime("onnxruntime", ("fp32", "fp16", "int8"), onnxruntime.build),
        "tensorrt": Runtime("tensorrt", ("fp32", "fp16", "int8"), None),
        "tensorrt-rtx": Runtime("tensorrt", ("fp32", "fp16", "int8"), None),
    }[name]


def require_buildable(target: Target) -> Build:
    """Return the runtime's builder, or say exactly what is missing.

    Raises:
        StageError: This version builds no engine for that runtime.
    """
    builder = find(target.runtime).build
    if builder is None:
        where = f" ({target.compute_capability})" if target.compute_capability else ""
        raise StageError(
            f"the target '{target.name}'{where} needs a {target.runtime} engine, and this version builds "
            "ONNX Runtime engines only: build, push and bench were not done",
            "the exported ONNX is kept and is what trtexec takes on the device: --onnx=model.onnx",
        )
    return builder


def require_precision(target: Target, precision: Precision) -> None:
    """Raise UsageError when a runtime does not compute in a precision."""
    known = find(target.runtime).precisions
    if precision not in known:
        raise UsageError(f"{target.runtime} has no {precision}", units.nearest(precision, list(known)))
