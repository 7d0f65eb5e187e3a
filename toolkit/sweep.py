"""A sweep: every candidate measured on the device, recorded, and the recommended one made current if asked for."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from toolkit import candidates, engines, networks, pipeline, runs, units, workers
from toolkit.candidates import Axes, Candidate, LeftOut
from toolkit.config import RuntimeName
from toolkit.console import Console
from toolkit.delivery import upkeep
from toolkit.devices.agent import Agent
from toolkit.errors import StageError, UsageError, disk_errors
from toolkit.job import Job
from toolkit.report import comparison, recorded, terminal, vega
from toolkit.report.document import FORMAT as RUN_FORMAT
from toolkit.runs import Outcome
from toolkit.stages import Reached, Runner, silenced
from toolkit.store import Store, write_json
from toolkit.workers import Make

FORMAT = 1  # raised when a reader of older documents would go wrong
SCHEMA = Path(__file__).parent / "report" / "sweep.schema.json"
_A_CANDIDATE = frozenset({"build", "bench", "compare", "report"})  # stages that no two candidates share


def execute(
    job: Job,
    axes: Axes,
    console: Console,
    rerun: frozenset[str] = frozenset(),
    parallel: int | None = None,
    *,
    commit: bool = False,
    halving: bool = False,
    ray: str | None = None,
) -> Outcome:
    """Measure every candidate on the device and say which to ship; recorded below ``BUILD/sweeps``.

    Each one is a run of its own up to its page: delivered, measured and judged, not current. What is there is
    reused, so that the same command goes on where it was interrupted.

    Args:
        job: What the candidates share.
        axes: What they differ in.
        console: Who is told of progress.
        rerun: Stages to make anew.
        parallel: How many networks are made at a time, by each machine of a cluster; the device measures one after
            the other in any case. None for as many as this machine has GPUs or cores for, and one on a cluster's.
        commit: Whether the recommended one becomes current.
        halving: Whether the worse half of each budget's networks is dropped after a quarter of the fine-tuning.
        ray: Address of the Ray cluster that makes the networks; None for this machine.

    Returns:
        The sweep's document, and the exit code: 0 when a candidate keeps the contract and, if that was asked for,
        has become current.

    Raises:
        UsageError: No candidate can be, or a fleet is meant.
        ToolkitError: The cluster cannot be reached, or what all candidates share cannot be made.
    """
    if job.target.fleet:
        raise UsageError("candidates are measured on one device, and a fleet is meant", "give --host")
    if job.gpus is not None and (parallel or ray):
        raise UsageError(
            "--gpus has several GPUs train one network, and --parallel and --ray make several networks at a time",
            "leave out one of them",
        )
    if halving and len(set(axes.pruners)) < 2:
        raise UsageError("--halving compares pruners at the same budget, and there is one", "give --pruner several")
    if shared := rerun - _A_CANDIDATE:
        raise UsageError(
            f"candidates share the stage '{min(shared)}', so that each would make it anew",
            f"toolkit run {job.target.name} --rerun {min(shared)}, then this again without",
        )
    store = Store(job.build / "store")
    with _workers(job, axes, parallel, ray, console) as make:
        with store.in_use(), silenced():
            found, left_out = candidates.lay_out(job, axes, Runner(store, console, "check", fast=job.fast))
        for one in left_out if found else left_out[1:]:
            console.warn(str(one))
        if not found:
            raise UsageError(f"{left_out[0].label}: {left_out[0].reason}", left_out[0].hint)
        if job.model.trainable:
            _share(found, make)
            if halving:
                _make([replace(one, job=_shortened(one.job)) for one in found], _network, make, console, "finetune")
                found, worse = candidates.halve(found, lambda one: _score(one, console))
                left_out += worse
                for dropped in worse:
                    console.warn(str(dropped))
            pruned = _make(found, _network, make, console, "prune")
            alike = _alike(pruned)
            made = _make(pruned, alike, make, console, "export")
            _make(made, lambda job: _graph(job, alike), make, console, "reference")
    measured, notes = _measure(found, console, rerun)
    return _conclude(job, measured, left_out, notes, console, commit=commit)


def _measure(
    found: Sequence[Candidate], console: Console, rerun: frozenset[str]
) -> tuple[list[tuple[Candidate, dict[str, Any]]], list[str]]:
    """Measure one candidate after the other; returns each with its document, and what is to be said of runtimes.

    Where a target has alternatives, the first candidate of a precision says which runtime the others take.
    """
    measured, notes, brief = [], [], Console(quiet=console.quiet, brief=True)
    fastest: dict[str, RuntimeName] = {}
    for number, candidate in enumerate(found, 1):
        precision = candidate.job.precision
        one = candidate.using(fastest[precision]) if precision in fastest else candidate
        console.say(f"candidate {number} of {len(found)}: {one.label}")
        outcome = runs.execute(one.job, "report", brief, rerun)
        if outcome.error:
            console.warn(f"{one.label}: {outcome.error.message}")
        elif one.job.target.alternatives:
            if text := terminal.runtimes(outcome.document):
                notes.append(f"{precision} in {text}, with {one.label}")
                console.say(notes[-1])
            fastest[precision] = outcome.document["engine"]["runtime"]
            one = candidate.using(fastest[precision])
        measured.append((one, outcome.document))
    return measured, notes


def _shortened(job: Job) -> Job:
    """Return a job with a quarter of its fine-tuning."""
    return job.trained_by(finetune_epochs=max(1, job.recipe.finetune_epochs // 4))


def _score(candidate: Candidate, console: Console) -> float:
    """Return the validation accuracy of a candidate's network after a quarter of its fine-tuning."""
    job = _shortened(candidate.job)
    store = Store(job.build / "store")
    stages = Runner(store, Console(quiet=console.quiet, brief=True), "finetune", fast=job.fast)
    with store.in_use(), silenced(), contextlib.suppress(Reached):
        networks.compress(job, stages)
    history = stages.artifacts["finetune"].meta["history"] or stages.artifacts["train"].meta["history"]
    # of the best epoch; of none where it is neither trained nor fine-tuned
    accuracy: float = max((epoch["val"] for epoch in history), default=0.0)
    console.say(f"{candidate.label}: validation {accuracy:.2%} after {job.recipe.finetune_epochs} epochs")
    return accuracy


def _workers(
    job: Job, axes: Axes, parallel: int | None, ray: str | None, console: Console
) -> contextlib.AbstractContextManager[Make]:
    """Return what makes several networks at a time."""
    if ray is not None:
        from toolkit import cluster

        return cluster.connected(ray, parallel or 1, job)
    several = len(set(axes.budgets)) * len(set(axes.pruners)) * len(set(axes.precisions))
    if not job.model.trainable or several == 1 or job.gpus is not None:
        parallel = 1
    elif parallel is None:
        with silenced():  # before PyTorch is imported, whose progress bars ask once
            parallel = workers.fitting()
    return workers.processes(min(several, parallel), console)


def _share(found: Sequence[Candidate], make: Make) -> None:
    """Make what several candidates share, a pruner at a time: the training, and its search.

    A budget that prunes nothing needs no search, the smallest one does. What keeps one pruner from it is said by
    the runs of its candidates; what keeps all of them is raised.
    """
    smallest = {one.job.profile.pruner: one.job for one in sorted(found, key=lambda one: -one.flops)}
    errors = [error for one in smallest.items() for _, error in make(dict([one]), "prune") if error]
    if len(errors) == len(smallest):
        raise errors[0]


def _network(job: Job) -> str:
    """Return what sets a job's network apart."""
    return f"{job.budget} {job.profile.pruner}"


def _alike(pruned: Sequence[Candidate]) -> Callable[[Job], str]:
    """Return what names a job's network after the first one that was pruned to the same; it is fine-tuned once."""
    names: dict[str, str] = {}
    first: dict[str, str] = {}
    for one in pruned:
        if (name := _network(one.job)) not in names:
            found = workers.found_of(one.job, "prune")
            digest = next(artifact.digest for (stage, _), artifact in found.items() if stage == "prune")
            names[name] = first.setdefault(digest, name)
    return lambda job: names[_network(job)]


def _graph(job: Job, alike: Callable[[Job], str]) -> str:
    """Return what sets the graph apart that a job's engine is built from."""
    return f"{alike(job)} {job.precision} {engines.spelling(job.target)}"


def _make(
    found: Sequence[Candidate], what: Callable[[Job], str], make: Make, console: Console, until: str
) -> list[Candidate]:
    """Make what candidates need up to a stage, once what several share; returns those that have it.

    Whatever keeps one from it is said by that candidate's own run.
    """
    begun = time.monotonic()
    jobs = {what(one.job): one.job for one in found}
    failed = set()
    for name, error in make(jobs, until):
        if error:
            failed.add(name)
        became = f"not made: {error.message}" if error else f"made after {units.duration(time.monotonic() - begun)}"
        console.say(f"{name}: {until} {became}")
    return [one for one in found if what(one.job) not in failed]


def _conclude(
    job: Job,
    measured: Sequence[tuple[Candidate, dict[str, Any]]],
    left_out: Sequence[LeftOut],
    notes: Sequence[str],
    console: Console,
    *,
    commit: bool,
) -> Outcome:
    """Choose, make current if that was asked for, and write the document and its page."""
    name = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{job.target.name}-{secrets.token_hex(2)}"
    folder = job.build / "sweeps" / name
    store = Store(job.build / "store")
    with disk_errors(job.build, "the sweep's record"), store.in_use():
        entries = [
            comparison.Entry(candidate.label, document, recorded.artifact(store, document, "bench"))
            for candidate, document in measured
            if document["bench"]
        ]
        rows = {row["label"]: row for row in comparison.tabulate(entries)}
        told = [_told(candidate, document, rows.get(candidate.label)) for candidate, document in measured]
        recommended, why = candidates.choose(told)
        current = _current(measured[0][0].job, console)
        known = current is None or current in [one["release"] for one in told]
        incumbent = None if known else _recorded(job, store, current, measured)
        outcome = None
        if commit and recommended is not None:
            best = next(candidate for candidate, _ in measured if candidate.label == recommended)
            console.say(f"recommended: {recommended}")
            outcome = runs.execute(best.job, "commit", Console(quiet=console.quiet, brief=True))
        record = {
            "format": FORMAT,
            "sweep": name,
            "target": job.target.name,
            "profile": job.profile.name,
            "workload": {"model": str(job.model), "data": str(job.data), "seed": job.seed},
            "fast": job.fast,
            "candidates": told,
            "left_out": [vars(one) for one in left_out],
            "current": current,
            "incumbent": incumbent and incumbent.document["run"],
            "recommended": recommended,
            "why": why,
            "commit": outcome and outcome.document["commit"],
            "report": None,
        }
        folder.mkdir(parents=True)
        if entries:
            by_release = {one["label"]: one["release"] for one in told}
            shown = [
                replace(entry, recommended=entry.label == recommended, current=by_release[entry.label] == current)
                for entry in entries
            ]
            if incumbent is not None:
                shown.append(incumbent)
            lead = f"Recommended: {recommended}, {why}" if recommended else why
            notes = [*notes, *map(str, left_out), *_failures(told)]
            title = f"{job.model} on {job.target.name}: {len(told)} candidates"
            page = comparison.html(title, shown, notes, vega.library(store.root / ".vega"), lead)
            record["report"] = str(folder / "report.html")
            (folder / "report.html").write_text(page, encoding="utf-8")
        write_json(folder / "sweep.json", record)
    error = outcome.error if outcome else None
    exit_code = outcome.exit_code if outcome else 0 if recommended else 1
    return Outcome(record, error, exit_code)


def _told(candidate: Candidate, document: Mapping[str, Any], row: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a sweep's document says of a candidate."""
    job = candidate.job
    return {
        "label": candidate.label,
        "budget": document["budget"],
        "precision": job.precision,
        "pruner": job.profile.pruner if job.model.trainable else None,
        "runtime": job.target.runtime,
        "run": document["run"],
        "release": _release(document),
        "verdict": document["verdict"] and document["verdict"]["status"],
        "p50": row and row["p50"],
        "accuracy": row and row["accuracy"],
        "accuracy_low": row and row["low"],
        "accuracy_high": row and row["high"],
        "flops": document["model"]["final"] and document["model"]["final"]["flops"],
        "engine_bytes": document["engine"] and document["engine"]["bytes"],
        "front": bool(row and row["front"]),
        "error": document["error"],
    }


def _failures(told: Iterable[Mapping[str, Any]]) -> list[str]:
    return [f"{one['label']} was not measured: {one['error']['message']}" for one in told if one["error"]]


def _release(document: Mapping[str, Any]) -> str | None:
    """Return the release that a run has pushed."""
    pushed = [stage["artifact"] for stage in document["stages"] if stage["name"] == "push"]
    return pushed[-1] if pushed else None


def _current(job: Job, console: Console) -> str | None:
    """Return the release that the device runs; None, with a warning, where it cannot be asked any more."""
    try:
        installed = upkeep.listed(Agent(pipeline.destination(job).device))
    except StageError as error:
        console.warn(f"which release is current is not known: {error.message}")
        return None
    return next((release.id for release in installed if release.current), None)


def _recorded(
    job: Job, store: Store, release: str | None, measured: Sequence[tuple[Candidate, Mapping[str, Any]]]
) -> comparison.Entry | None:
    """Return the newest run that has measured a release on the same device and data, if it is still there."""
    devices = [document["bench"]["device"] for _, document in measured if document["bench"]]
    for path in sorted((job.build / "runs").glob("*/run.json"), reverse=True):
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != RUN_FORMAT or document["target"] != job.target.name or not document["bench"]:
            continue
        alike = document["workload"]["data"] == str(job.data) and document["bench"]["device"] in devices
        if alike and _release(document) == release:
            with contextlib.suppress(StageError):  # gc has removed what was measured
                bench = recorded.artifact(store, document, "bench")
                return comparison.Entry("current release", document, bench, current=True)
    return None
