"""A release measured on its device, round after round, until its contract is decided or the time is over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.bench import agreement, attribution, staircase, statistics
from toolkit.config import Benchmark, Precision, RuntimeName
from toolkit.delivery import release as delivery
from toolkit.delivery.release import Release
from toolkit.devices.agent import Agent
from toolkit.networks import Networks
from toolkit.store import Work

_NOTHING_COMPUTED = {"accuracy": None, "top5": None, "agreement": None, "attribution": None}  # by trtexec
_OF_A_ROUND = ("scenarios", "warmup", "tuning", "conditions", "load_ms", "first_ms")
Undecided = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Plan:
    """How a release is measured.

    Attributes:
        benchmark: How long, how often, with which batches.
        tuning: Power mode and clocks; see ``agent/tuning.py``.
        scenario: Whose latency the contract judges.
        confidence: Of the intervals, 0 to 1.
        precision: The engine's.
        runtime: The engine's.
    """

    benchmark: Benchmark
    tuning: Mapping[str, Any]
    scenario: str
    confidence: float
    precision: Precision
    runtime: RuntimeName


def measure(
    work: Work, networks: Networks, release: Release, agent: Agent, plan: Plan, undecided: Undecided
) -> dict[str, Any]:
    """Measure a release; every round is a process of its own on the device.

    The first round measures everything, the others what the contract judges. What it leaves undecided is measured
    on, twice as long each time, until it is decided or the benchmark's ``time_limit`` is over.

    Args:
        work: Raw files go to ``round-K/`` in its ``out``.
        networks: The engine's graph, and what the host computes.
        release: It, on the device.
        agent: On the device.
        plan: How.
        undecided: Whether what is known so far leaves a clause open that measuring on could decide.

    Returns:
        What statistics, attribution and staircase say, what the agent told of its first round, and ``rounds``: the
        raw files of each.

    Raises:
        StageError: The device computes something else than the graph, or cannot be measured.
    """
    benchmark = plan.benchmark
    if (logits := delivery.probe(release, agent, agreement.PROBED)) is not None:
        agreement.require_alike(networks.reference, logits, plan.precision, agent.device.name)
    begun = time.monotonic()
    rounds: list[dict[str, Any]] = []

    def measured(scenarios: list[dict[str, Any]], *, whole: bool) -> dict[str, Any]:
        request = {
            "warmup_ms": benchmark.warmup,
            "scenarios": scenarios,
            "tuning": plan.tuning,
            "evaluate": whole,
            "profile": whole,
        }
        folder = f"round-{len(rounds)}"
        result = delivery.bench(release, agent, request, work.out / folder, work.progress)
        for entry in result["scenarios"]:
            entry["file"] = f"{folder}/{entry['file']}"
        telemetry = result["telemetry"] and f"{folder}/{result['telemetry']}"
        rounds.append({key: result[key] for key in _OF_A_ROUND} | {"telemetry": telemetry})
        return result

    def summary() -> dict[str, Any]:
        return statistics.summarise(work.out, rounds, plan.scenario, plan.confidence)

    share = benchmark.duration / benchmark.rounds
    first = measured(_scenarios(benchmark, share), whole=True)
    profile, computed = first.pop("profile"), work.out / "round-0" / "logits.npy"
    told = first | _NOTHING_COMPUTED
    if computed.exists():
        told |= attribution.attribute(
            work.out, networks.data, networks.baseline, networks.tuned, networks.reference, computed
        )
        if told["accuracy"] is None:
            of_classes = told["attribution"] is not None
            why = "the data have no labels" if of_classes else "the network's output is not (N, classes)"
            told["not_measured"] = {**told["not_measured"], "accuracy": why}
    told["staircase"] = (
        staircase.staircase(
            work.out, networks.graph.file("model.onnx"), profile, agent.device.facts(), plan.runtime
        )
        if profile
        else None
    )
    judged = [entry for entry in _scenarios(benchmark, share) if entry["name"] == plan.scenario]
    while len(rounds) < benchmark.rounds:
        measured(judged, whole=False)
    meta = told | summary()
    duration = share
    while undecided(meta):
        left = 1000 * (benchmark.time_limit / 1000 - (time.monotonic() - begun))
        duration = min(2 * duration, left)
        if duration < share:
            break
        offline = {"name": "Offline", "batch": meta["throughput"]["batch"], "duration_ms": duration / 2}
        measured([entry | {"duration_ms": duration} for entry in judged] + [offline], whole=False)
        meta = told | summary()
    return meta | {"rounds": rounds}


def _scenarios(benchmark: Benchmark, share: float) -> list[dict[str, Any]]:
    """Return what the agent is asked for, ``share`` milliseconds each."""
    found: list[dict[str, Any]] = [
        {"name": "SingleStream", "duration_ms": share, "queries": math.ceil(benchmark.queries / benchmark.rounds)}
    ]
    found += [{"name": "Offline", "batch": batch, "duration_ms": benchmark.duration} for batch in benchmark.batches]
    if benchmark.period is not None:
        found.append({"name": "DutyCycle", "period_ms": benchmark.period, "duration_ms": share})
    return found
