"""The contract held against a measurement: a line and a reason for each clause."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from toolkit.bench.statistics import PERCENTILES, samples_needed
from toolkit.config import Contract

Status = Literal["passed", "failed", "undecided"]


@dataclass(frozen=True)
class Line:
    """One clause: what was asked, what was measured, and whether that is enough; undecided without measurement."""

    what: str
    limit: float
    measured: float | None
    unit: str
    status: Status
    reason: str

    @property
    def passed(self) -> bool:
        """Whether it was measured and kept."""
        return self.status == "passed"


@dataclass(frozen=True)
class Verdict:
    """The whole contract: passed when every line has, failed when one has, otherwise undecided."""

    status: Status
    lines: list[Line]

    @property
    def passed(self) -> bool:
        """Whether every clause was measured and kept."""
        return self.status == "passed"

    def as_json(self) -> dict[str, Any]:
        """Return what stands in a run's document."""
        lines = [asdict(line) | {"passed": line.passed} for line in self.lines]
        return {"status": self.status, "passed": self.passed, "lines": lines}


def judge(
    contract: Contract, bench: dict[str, Any], reference_accuracy: float | None, engine_bytes: int
) -> Verdict:
    """Hold a measurement against a contract.

    Args:
        contract: Clauses that are None are not judged.
        bench: ``latency_ms``, ``throughput``, ``accuracy``, ``peak_memory_bytes`` and ``samples`` of a run, and
            ``not_measured``: the reason for each of these that is None.
        reference_accuracy: Of the unpruned fp32 network, or of the user's ONNX file, on the same images, 0 to 1;
            None without labels.
        engine_bytes: Size of the engine.
    """
    accuracy = bench["accuracy"]
    drop = None if accuracy is None or reference_accuracy is None else reference_accuracy - accuracy
    why = {name: f"not measured: {reason}" for name, reason in bench["not_measured"].items()}
    no_accuracy = why.get("accuracy", "not measured")
    rate = bench["throughput"]["samples_per_s"]
    clauses = [
        *(_latency(percentile, contract, bench) for percentile in PERCENTILES),
        _line("throughput", contract.throughput, rate, "samples/s", at_least=True),
        _line("accuracy", contract.min_accuracy, accuracy, "", at_least=True, missing=no_accuracy),
        _line("accuracy drop", contract.max_accuracy_drop, drop, "", missing=no_accuracy),
        _line(
            "peak memory",
            contract.peak_memory,
            bench["peak_memory_bytes"],
            "bytes",
            missing=why.get("peak memory", ""),
        ),
        _line("engine size", contract.engine_size, engine_bytes, "bytes"),
    ]
    lines = [line for line in clauses if line is not None]
    found = {line.status for line in lines}
    return Verdict("failed" if "failed" in found else "undecided" if "undecided" in found else "passed", lines)


def _latency(percentile: int, contract: Contract, bench: dict[str, Any]) -> Line | None:
    name = f"p{percentile}"
    missing = f"{bench['samples']} samples, and {name} needs {samples_needed(percentile)}"
    limit = getattr(contract, f"latency_{name}")
    return _line(f"latency {name}", limit, bench["latency_ms"][name], "ms", missing=missing)


def _line(
    what: str,
    limit: float | None,
    measured: float | None,
    unit: str,
    *,
    at_least: bool = False,
    missing: str = "not measured",
) -> Line | None:
    """Judge one clause; None where the contract leaves it out."""
    if limit is None:
        return None
    if measured is None:
        return Line(what, limit, None, unit, "undecided", missing)
    kept = measured >= limit if at_least else measured <= limit
    side = ("below", "above")[kept] if at_least else ("above", "within")[kept]
    reason = f"{show(abs(measured - limit), unit)} {side} the limit of {show(limit, unit)}"
    return Line(what, limit, measured, unit, "passed" if kept else "failed", reason)


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
