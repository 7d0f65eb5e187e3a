"""The contract held against a measurement: a line and a reason for each clause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from toolkit.bench.distributions import paired_difference, wilson
from toolkit.bench.intervals import Figure, figure
from toolkit.bench.statistics import PERCENTILES
from toolkit.config import Contract

Status = Literal["passed", "failed", "undecided"]


@dataclass(frozen=True)
class Line:
    """One clause: what was asked, what was measured, and whether that is enough.

    Attributes:
        what: The clause.
        limit: What was asked.
        measured: What was found; None without measurement.
        low: Where the interval of ``measured`` begins; None where there is none.
        high: Where it ends.
        unit: Of all of them: ``ms``, ``samples/s``, ``bytes``, ``W``, ``mJ``; empty for a share of 1.
        status: ``undecided`` where it was not measured, or not closely enough.
        reason: Why, one sentence.
        by_time: Whether an undecided one could be decided by measuring on.
    """

    what: str
    limit: float
    measured: float | None
    low: float | None
    high: float | None
    unit: str
    status: Status
    reason: str
    by_time: bool = False

    @property
    def passed(self) -> bool:
        """Whether it was measured and kept."""
        return self.status == "passed"

    def as_json(self) -> dict[str, Any]:
        """Return what stands in a run's document."""
        told = asdict(self) | {"passed": self.passed}
        del told["by_time"]
        return told


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
        return {"status": self.status, "passed": self.passed, "lines": [line.as_json() for line in self.lines]}


def judge(
    contract: Contract, bench: Mapping[str, Any], reference_accuracy: float | None, engine_bytes: int
) -> Verdict:
    """Hold a measurement against a contract.

    A figure with an interval keeps its clause when the whole interval does, and breaks it when none of it does.
    Accuracy is exact on these images, so that its value decides; its interval says what other images would give.

    Args:
        contract: Clauses that are None are not judged.
        bench: The bench artifact's meta.
        reference_accuracy: Of the unpruned fp32 network, or of the user's ONNX file, on the same images, 0 to 1;
            None without labels.
        engine_bytes: Size of the engine.
    """
    why = {name: f"not measured: {reason}" for name, reason in bench["not_measured"].items()}
    throughput, power = bench["throughput"], bench["power"] or {}
    accuracy, drop = _accuracy(bench, reference_accuracy, contract.confidence)
    no_power = why.get("power", "not measured: the device tells of no power that could be read")
    clauses = [
        *(_latency(percentile, contract, bench, why) for percentile in PERCENTILES),
        _estimated(
            "throughput", contract.throughput, throughput and throughput["samples_per_s"], "samples/s",
            why.get("throughput", "not measured"), at_least=True,
        ),
        _exact("accuracy", contract.min_accuracy, accuracy, "", why.get("accuracy", "not measured"), at_least=True),
        _exact("accuracy drop", contract.max_accuracy_drop, drop, "", why.get("accuracy", "not measured")),
        _exact(
            "peak memory", contract.peak_memory, _bare(bench["peak_memory_bytes"]), "bytes",
            why.get("peak memory", "not measured"),
        ),
        _exact("engine size", contract.engine_size, _bare(engine_bytes), "bytes", ""),
        _estimated("power", contract.power, power.get("watts"), "W", no_power),
        _estimated("energy", contract.energy, power.get("energy_mj"), "mJ", no_power),
        _regression(contract.max_regression, bench["regression"], why.get("regression")),
    ]  # fmt: skip
    lines = [line for line in clauses if line is not None]
    found = {line.status for line in lines}
    return Verdict("failed" if "failed" in found else "undecided" if "undecided" in found else "passed", lines)


def undecided_by_time(verdict: Verdict) -> bool:
    """Return whether measuring on could still turn the verdict into passed or failed."""
    return verdict.status == "undecided" and any(line.by_time for line in verdict.lines)


def regression_undecided(contract: Contract, regression: Mapping[str, Any]) -> bool:
    """Return whether further processes could still decide the clause on the current release."""
    line = _regression(contract.max_regression, regression, None)
    return line is not None and line.by_time


def _bare(value: float | None) -> Figure | None:
    return None if value is None else figure(value, None, None)


def _accuracy(
    bench: Mapping[str, Any], reference: float | None, confidence: float
) -> tuple[Figure | None, Figure | None]:
    """Return accuracy with Wilson's interval, and its drop with that of shares of the same images.

    An image that one step loses and a later one gains back counts in both, which makes the drop's interval wider
    than it need be, never narrower.
    """
    accuracy, images = bench["accuracy"], bench["images"]
    if accuracy is None:
        return None, None
    shown = figure(accuracy, *wilson(round(accuracy * images), images, confidence))
    if reference is None:
        return shown, None
    if bench["attribution"] is None:
        return shown, figure(reference - accuracy, None, None)
    lost, gained = (sum(step[way] for step in bench["attribution"]["steps"]) for way in ("lost", "gained"))
    return shown, figure(reference - accuracy, *paired_difference(lost, gained, images, confidence))


def _latency(percentile: int, contract: Contract, bench: Mapping[str, Any], why: Mapping[str, str]) -> Line | None:
    limit: float | None = getattr(contract, f"latency_p{percentile}")
    what = f"latency p{percentile}"
    if contract.scenario != bench["scenario"]:
        return _exact(what, limit, None, "ms", why.get(contract.scenario, f"{contract.scenario} was not measured"))
    found = bench["latency_ms"][f"p{percentile}"]
    missing = f"{bench['samples']:,} queries, and p{percentile} needs {found['needs'] or 0:,} like them"
    return _estimated(what, limit, found, "ms", missing)


def _regression(limit: float | None, regression: Mapping[str, Any] | None, missing: str | None) -> Line | None:
    """Judge the new release's median latency against the current one's."""
    what = "regression"
    if limit is None or (regression is None and missing):
        return _exact(what, limit, None, "", missing or "")
    if regression is None:
        return Line(what, limit, None, None, None, "", "passed", "no other release is current there")
    ratio = regression["ratio"]
    change = {key: None if ratio[key] is None else ratio[key] - 1 for key in ("value", "low", "high")}
    return _estimated(what, limit, change | {"needs": ratio["needs"]}, "", "too few comparisons")


def _exact(
    what: str, limit: float | None, found: Figure | None, unit: str, missing: str, *, at_least: bool = False
) -> Line | None:
    """Judge a clause by its value; None where the contract leaves it out."""
    if limit is None:
        return None
    if found is None:
        return Line(what, limit, None, None, None, unit, "undecided", missing)
    value = found["value"]
    kept = value >= limit if at_least else value <= limit
    reason = _apart(value, limit, unit, at_least)
    return Line(what, limit, value, found["low"], found["high"], unit, "passed" if kept else "failed", reason)


def _estimated(
    what: str, limit: float | None, found: Figure | None, unit: str, missing: str, *, at_least: bool = False
) -> Line | None:
    """Judge a clause by the interval of its value; None where the contract leaves it out."""
    if limit is None or found is None:
        return _exact(what, limit, None, unit, missing)
    value, low, high = found["value"], found["low"], found["high"]
    if value is None or low is None or high is None:
        reason = missing if value is None else "a single sample has no interval"
        return Line(what, limit, value, None, None, unit, "undecided", reason, by_time=True)
    kept, broken = (low >= limit, high < limit) if at_least else (high <= limit, low > limit)
    if not kept and not broken:
        reason = f"the limit of {show(limit, unit)} lies within {show(low, unit)} to {show(high, unit)}"
        return Line(what, limit, value, low, high, unit, "undecided", reason, by_time=True)
    reason = _apart(value, limit, unit, at_least)
    return Line(what, limit, value, low, high, unit, "passed" if kept else "failed", reason)


def _apart(value: float, limit: float, unit: str, at_least: bool) -> str:
    side = ("below" if value < limit else "above") if at_least else ("above" if value > limit else "within")
    return f"{show(abs(value - limit), unit)} {side} the limit of {show(limit, unit)}"


def show(value: float | None, unit: str) -> str:
    """Format a value of a verdict's line with its unit; a share is shown in percent."""
    if value is None:
        return "not measured"
    if unit == "":
        return f"{value:.2%}"
    if unit == "bytes":
        return f"{value / 1e6:.2f} MB"
    if unit == "samples/s":
        return f"{value:,.0f} {unit}"
    return f"{value:.3f} {unit}"


def interval(figure: Mapping[str, Any], unit: str) -> str:
    """Format the interval of a figure, or of a verdict's line; empty where it has none."""
    low, high = figure["low"], figure["high"]
    return "" if low is None or high is None else f"{show(low, unit).split(' ')[0]} – {show(high, unit)}"
