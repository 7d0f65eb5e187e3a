"""Everything of a measurement that can be made again from its raw files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.bench import early_stopping, stability
from toolkit.bench.intervals import METHOD, Figure, Series, figure, mean, percentile, scaled
from toolkit.bench.intervals import effective as effective_samples
from toolkit.bench.power import power
from toolkit.bench.series import Run, read

PERCENTILES = (50, 90, 99)


def summarise(
    folder: Path, rounds: Sequence[Mapping[str, Any]], scenario: str, confidence: float
) -> dict[str, Any]:
    """Return what a measurement's raw files say.

    Args:
        folder: Where the files are.
        rounds: One a process of the agent: ``scenarios`` and ``telemetry`` as it returned them, file names relative
            to ``folder``; ``warmup``, ``tuning`` and ``conditions``, where they are there, make findings and their
            hints more exact.
        scenario: Whose latency the contract judges: ``SingleStream`` or ``DutyCycle``; ``SingleStream`` stands in
            for one that was not measured.
        confidence: Of every interval, 0 to 1.

    Returns:
        ``scenario``, ``samples``, ``confidence``, ``method``, ``latency_ms``, ``scenarios``, ``throughput``,
        ``batches``, ``power``, ``stability`` and ``early_stopping`` of the bench artifact.
    """
    runs: dict[tuple[str, int], list[Run]] = {}
    for run in read(folder, rounds):
        runs.setdefault((run.entry["name"], run.entry["batch"]), []).append(run)
    scenarios = {name: _scenario(of, confidence) for (name, _), of in runs.items() if name != "Offline"}
    batches: list[dict[str, Any]] = [
        {"batch": batch, "samples_per_s": _rate(batch, [run.series for run in of], confidence)}
        for (name, batch), of in sorted(runs.items(), key=lambda item: item[0][1])
        if name == "Offline"
    ]
    scenario = scenario if scenario in scenarios else "SingleStream"
    judged = runs[scenario, 1]
    return {
        "scenario": scenario,
        "samples": sum(len(run.series) for run in judged),
        "confidence": confidence,
        "method": METHOD,
        "latency_ms": scenarios[scenario]["latency_ms"],
        "scenarios": scenarios,
        "throughput": max(batches, key=lambda entry: float(entry["samples_per_s"]["value"]), default=None),
        "batches": batches,
        "power": power(runs["SingleStream", 1], confidence),
        "stability": stability.judge(judged, rounds),
        "early_stopping": early_stopping.estimates([run.series for run in judged], PERCENTILES),
    }


def _scenario(runs: Sequence[Run], confidence: float) -> dict[str, Any]:
    series = [run.series for run in runs]
    told: dict[str, Any] = {
        "queries": sum(len(part) for part in series),
        "effective": effective_samples(series, 50, confidence),
        "seconds": round(sum(run.seconds for run in runs), 3),
        "latency_ms": latency(series, confidence),
    }
    if "period_ms" in runs[0].entry:
        told |= {
            "period_ms": runs[0].entry["period_ms"],
            "late": sum(run.entry["late"] for run in runs),
        }
    return told


def latency(rounds: Sequence[Series], confidence: float) -> dict[str, Any]:
    """Return percentiles and mean as figures, min and max; nanoseconds in, milliseconds out."""
    ordered = np.sort(np.concatenate(rounds))
    found: dict[str, Any] = {f"p{p}": percentile(rounds, p, confidence, ordered) for p in PERCENTILES}
    found["mean"] = mean(rounds, confidence)
    found = {name: scaled(entry, 1e-6) for name, entry in found.items()}
    return found | {"min": round(ordered[0] / 1e6, 6), "max": round(ordered[-1] / 1e6, 6)}


def _rate(batch: int, rounds: Sequence[Series], confidence: float) -> Figure:
    """Return samples per second from the nanoseconds of each batch."""
    took = mean(rounds, confidence)
    low, high = took["low"], took["high"]
    rate = batch * 1e9
    return figure(
        round(rate / took["value"], 3),
        round(rate / high, 3) if high else None,
        round(rate / low, 3) if low else None,
    )
