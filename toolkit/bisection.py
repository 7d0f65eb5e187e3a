"""The largest FLOPs budget whose engine keeps the contract on the device, found by measuring."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from toolkit import networks, pipeline, runs, units
from toolkit.bench import latency_table
from toolkit.config import Contract, Flops
from toolkit.console import Console
from toolkit.errors import StageError, UsageError
from toolkit.job import Job
from toolkit.report import recorded
from toolkit.report.document import FORMAT
from toolkit.runs import Outcome
from toolkit.stages import Reached, Runner, silenced
from toolkit.store import Store

STEPS = 20  # budgets that are told apart: 5 % of what pruning can reach
PROBES = 7  # a guess that is right takes three of them: the whole network, the guess, the step above it
_OF_WEIGHTS: dict[str, None] = dict.fromkeys(("min_accuracy", "max_accuracy_drop", "max_regression"))


def largest(job: Job, console: Console, rerun: frozenset[str] = frozenset()) -> Outcome:
    """Find the largest budget whose engine keeps the contract, and do the whole job with it.

    Latency does not depend on weights, so that a probe is pruned, not fine-tuned, and judged without the clauses
    on accuracy; what was found is fine-tuned and judged by all of them. In a lower precision that costs it layers
    where the accuracy needs them in fp32, and with them time: its own verdict counts, not the probe's.

    Raises:
        UsageError: The contract asks for nothing that a smaller network helps, or the model is not pruned.
        StageError: No budget keeps the contract.
    """
    if not _limited(job.profile.contract):
        raise UsageError(
            f"the contract of profile {job.profile.name} limits neither latency nor throughput",
            "give it a clause, as latency_p99: 2 ms",
        )
    smallest, whole = reach(job, console)
    budgets = [budget_at(step / STEPS, smallest, whole) for step in range(STEPS + 1)]
    tried: dict[int, dict[str, Any]] = {}

    def keeps(step: int) -> bool:
        document = tried[step] = probe(job, budgets[step], console)
        console.say(f"probe at {budgets[step]}: {_said(job, document)}")
        return bool(document["verdict"]["passed"])

    found = search(keeps, lambda: _guess(job, tried[STEPS], budgets, whole))
    if found is None:
        least = min(tried)
        broken = next(line for line in tried[least]["verdict"]["lines"] if not line["passed"])
        raise StageError(
            f"no budget keeps the contract on the device: at {budgets[least]}, "
            f"{broken['what']} is {broken['status']} ({broken['reason']})",
            "another precision or runtime (toolkit sweep), or another limit in the profile",
        )
    above = min((step for step in tried if step > found), default=found)
    if above - found <= 1:
        said = f"the largest budget that keeps the contract is {budgets[found]}"
    else:
        said = f"{budgets[found]} keeps the contract, {budgets[above]} does not, nothing between was measured"
    console.say(f"{said}; now with fine-tuning")
    return runs.execute(replace(job, budget=budgets[found]), "commit", console, rerun)


def search(keeps: Callable[[int], bool], guess: Callable[[], int]) -> int | None:
    """Return the largest of the steps ``0..STEPS`` that keeps the contract, as far as ``PROBES`` probes can tell.

    From the guess it goes on in ever larger strides until the limit lies between two steps, then by halves.

    Args:
        keeps: Measures a step; a larger one is slower.
        guess: Where the limit may lie, once the largest step is known not to keep it.
    """
    if keeps(STEPS):
        return STEPS
    low, high = -1, STEPS  # does not keep it, or is not known to; does not
    step = min(max(guess(), 0), STEPS - 1)
    for turn in range(PROBES - 1):
        if keeps(step):
            low = step
        else:
            high = step
        if high - low <= 1:
            break
        if low < 0:
            step = max(high - 2**turn, 0)
        elif high == STEPS:
            step = min(low + 2**turn, STEPS - 1)
        else:
            step = (low + high) // 2
    return None if low < 0 else low


def reach(job: Job, console: Console) -> tuple[float, float]:
    """Return the FLOPs of the smallest network that pruning can make, and of the whole one.

    Raises:
        UsageError: The model is not pruned, or a fleet is meant.
    """
    if job.target.fleet:
        raise UsageError("networks are measured on one device, and a fleet is meant", "give --host")
    if not job.model.trainable:
        raise UsageError("an ONNX file is not pruned to a budget", "leave it to toolkit run, without --until")
    store = Store(job.build / "store")
    stages = Runner(store, console, "check", fast=job.fast)
    with store.in_use(), silenced(), contextlib.suppress(Reached):
        networks.compress(job, stages)
    known = stages.artifacts["check"].meta
    if known["smallest"] is None:
        raise UsageError(known["obstacle"], "a model that can be pruned, or toolkit run without --until")
    return known["smallest"], known["flops"]


def budget_at(share: float, smallest: float, whole: float) -> Flops:
    """Return the budget so far between the smallest network and the whole one."""
    return Flops(value=smallest + share * (whole - smallest), relative=False)


def probe(job: Job, budget: Flops, console: Console) -> dict[str, Any]:
    """Measure the network of a budget without fine-tuning, and judge what does not depend on its weights."""
    short = job.trained_by(finetune_epochs=0, qat_epochs=0)
    profile = short.profile.model_copy(update={"contract": job.profile.contract.model_copy(update=_OF_WEIGHTS)})
    brief = Console(quiet=console.quiet, brief=True)
    outcome = runs.execute(replace(job, profile=profile, budget=budget), "report", brief)
    if outcome.error:
        raise outcome.error
    return outcome.document


def measured_networks(job: Job, runtime: str) -> dict[str, latency_table.Network]:
    """Return what such a device has measured in a runtime, in the job's way, by the ``bench`` key."""
    store, facts = Store(job.build / "store"), pipeline.destination(job).device.facts()
    found: dict[str, latency_table.Network] = {}
    for path in sorted((job.build / "runs").glob("*/run.json")):
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or not document["bench"]:
            continue
        engine, bench = document["engine"], document["bench"]
        way = (engine["runtime"], engine["precision"], bench["scenario"], bench["ran"]["threads"])
        threads = job.target.threads if job.target.on_cpu else None
        asked = (runtime, job.precision, job.profile.contract.scenario, threads)
        if way != asked or any(facts.get(key) != value for key, value in bench["device"].items()):
            continue
        with contextlib.suppress(StageError):  # gc has removed it
            measured = recorded.artifact(store, document, "bench")
            final = document["model"]["final"]
            label = units.count(final["flops"]) if final else document["run"]
            if network := latency_table.read(label, measured):
                found[measured.key] = network
    return found


def profile(job: Job, console: Console) -> dict[str, Any]:
    """Measure three widths of a network, and predict each network that was measured there from the others' layers.

    Returns:
        ``networks`` (``network``, ``measured_ms``, ``predicted_ms``, ``error`` as a share), ``median_error`` and
        ``max_error`` of their absolute values.

    Raises:
        StageError: The runtime there does not tell the time of layers.
    """
    job = replace(job, target=job.target.using(job.target.runtime))  # a table is of one
    smallest, whole = reach(job, console)
    for share in (0.0, 0.5, 1.0):
        probe(job, budget_at(share, smallest, whole), console)
    known = list(measured_networks(job, job.target.runtime).values())
    if not known or not known[0].others(known):
        raise StageError("no two networks with timed layers were measured there", "another --runtime")
    shares = latency_table.errors(known)
    rows = [
        {"network": one.label, "measured_ms": one.ms, "predicted_ms": one.ms * (1 + error), "error": error}
        for one, error in zip(known, shares, strict=True)
    ]
    sizes = [abs(error) for error in shares]
    return {"networks": rows, "median_error": statistics.median(sizes), "max_error": max(sizes)}


def _limited(contract: Contract) -> bool:
    clauses = (contract.latency_p50, contract.latency_p90, contract.latency_p99, contract.throughput)
    return any(clause is not None for clause in clauses)


def _said(job: Job, document: Mapping[str, Any]) -> str:
    """Return predicted and measured latency of a probe, and what its contract says."""
    known = measured_networks(job, document["engine"]["runtime"])
    network = known.get(document["artifacts"]["bench"])
    others = network.others(known.values()) if network else []
    predicted = ""
    if network and others:
        predicted = f"predicted {latency_table.fit(others).predict(network):.3f} ms, "
    median = document["bench"]["latency_ms"]["p50"]["value"]
    return f"{predicted}measured {median:.3f} ms (p50), contract {document['verdict']['status']}"


def _guess(job: Job, whole: Mapping[str, Any], budgets: list[Flops], flops: float) -> int:
    """Return the step at which the table expects what the contract asks for; the middle without a table."""
    known = measured_networks(job, whole["engine"]["runtime"])
    network = known.get(whole["artifacts"]["bench"])
    if network is None:
        return STEPS // 2
    table = latency_table.fit(list(known.values()))
    wanted = network.ms * _factor(job.profile.contract, whole["bench"])
    fitting = [
        step for step, budget in enumerate(budgets) if table.predict(network.scaled(budget.value / flops)) <= wanted
    ]
    return max(fitting, default=0)


def _factor(contract: Contract, bench: Mapping[str, Any]) -> float:
    """Return by what a latency has to be multiplied to keep every clause on latency and throughput."""
    factors = [1.0]
    for name in ("p50", "p90", "p99"):
        limit, value = getattr(contract, f"latency_{name}"), bench["latency_ms"][name]["value"]
        if limit is not None and value is not None:
            factors.append(limit / value)
    if contract.throughput is not None and bench["throughput"]:
        factors.append(bench["throughput"]["samples_per_s"]["value"] / contract.throughput)
    return min(factors)
