"""The contract held against a measurement: a line and a reason for each clause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from toolkit.bench.statistics import samples_needed
from toolkit.config import Contract


@dataclass(frozen=True)
class Line:
    """One clause: what was asked, what was measured, and whether that is enough."""

    what: str
    limit: float
    measured: float | None
    unit: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The whole contract; it has passed when every line has."""

    passed: bool
    lines: list[Line]

    def as_json(self) -> dict[str, Any]:
        """Return what stands in a run's document."""
        return asdict(self)


def judge(contract: Contract, bench: dict[str, Any], baseline_accuracy: float, engine_bytes: int) -> Verdict:
    """Hold a measurement against a contract.

    Args:
        contract: Clauses that are None are not judged.
        bench: ``latency_ms``, ``throughput``, ``accuracy``, ``peak_memory_bytes`` and ``samples`` of a run.
        baseline_accuracy: Of the unpruned fp32 network on the same images, 0 to 1.
        engine_bytes: Size of the engine.
    """
    lines = []
    for percentile in (50, 90, 99):
        limit = getattr(contract, f"latency_p{percentile}")
        measured = bench["latency_ms"][f"p{percentile}"]
        if limit is not None:
            line = _at_most(f"latency p{percentile}", limit, measured, "ms")
            if measured is None:
                needed = samples_needed(percentile)
                line = replace(line, reason=f"{bench['samples']} samples, and p{percentile} needs {needed}")
            lines.append(line)
    checks: list[tuple[str, float | None, float, str, Callable[..., Line]]] = [
        ("throughput", contract.throughput, bench["throughput"]["samples_per_s"], "samples/s", _at_least),
        ("accuracy", contract.min_accuracy, bench["accuracy"], "", _at_least),
        ("accuracy drop", contract.max_accuracy_drop, baseline_accuracy - bench["accuracy"], "", _at_most),
        ("peak memory", contract.peak_memory, bench["peak_memory_bytes"], "bytes", _at_most),
        ("engine size", contract.engine_size, engine_bytes, "bytes", _at_most),
    ]
    for what, clause, value, unit, compare in checks:
        if clause is not None:
            lines.append(compare(what, clause, value, unit))
    return Verdict(all(line.passed for line in lines), lines)


def _at_most(what: str, limit: float, measured: float | None, unit: str) -> Line:
    if measured is None:
        return Line(what, limit, None, unit, passed=False, reason="not measured")
    side = "within" if measured <= limit else "above"
    reason = f"{show(abs(measured - limit), unit)} {side} the limit of {show(limit, unit)}"
    return Line(what, limit, measured, unit, measured <= limit, reason)


def _at_least(what: str, limit: float, measured: float, unit: str) -> Line:
    side = "above" if measured >= limit else "below"
    reason = f"{show(abs(measured - limit), unit)} {side} the limit of {show(limit, unit)}"
    return Line(what, limit, measured, unit, measured >= limit, reason)


def show(value: float | None, unit: str) -> str:
    """Format a value of a verdict's line with its unit; a share is shown in percent."""
    if value is None:
        return "not measured"
    if unit == "":
        return f"{value:.2%}"
    if unit == "bytes":
        return f"{value / 1e6:.2f} MB"
    if unit == "ms":
        return f"{value:.3f} ms"
    return f"{value:,.0f} {unit}"
