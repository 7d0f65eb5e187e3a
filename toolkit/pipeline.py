"""The product: train → prune → finetune → export → quantize → build → push → bench → judge → commit | rollback.

``networks.py`` has the stages up to the graph, ``measurement.py`` those that measure; what is left stands here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from toolkit import engines, measurement, networks
from toolkit.agent.fingerprint import mismatch
from toolkit.bench.contract import Verdict
from toolkit.delivery import release as delivery
from toolkit.delivery import upkeep
from toolkit.delivery.release import Commitment, Release
from toolkit.delivery.upkeep import UnhealthyError
from toolkit.devices import Device, open_device
from toolkit.devices.agent import Agent
from toolkit.engines import places
from toolkit.engines.places import Place
from toolkit.errors import StageError, UsageError
from toolkit.job import Job
from toolkit.measurement import Delivered
from toolkit.networks import Networks
from toolkit.stages import Runner
from toolkit.store import Artifact, Work

STAGES = (
    "data", "check", "teacher", "train", "prune", "finetune", "export", "quantize", "reference", "build", "push",
    "bench", "compare", "report",
)  # fmt: skip


def stages_of(job: Job, until: str) -> list[str]:
    """Return the stages that a job takes, in order, up to one of them."""
    left_out = {"compare"} if job.profile.contract.max_regression is None else set()
    left_out |= {"teacher"} if job.teacher_recipe is None else set()
    end = STAGES.index(until) + 1 if until in STAGES else None
    return [stage for stage in STAGES[:end] if stage not in left_out]


def run(job: Job, stages: Runner) -> None:
    """Take a workload through every stage, up to the one that ``stages`` ends with.

    Raises:
        Reached: The last stage that was asked for is done; ``stages`` holds what was made.
        ToolkitError: Something that the user can act on; everything made before it is kept.
    """
    deliver(job, stages, networks.compress(job, stages))


def deliver(job: Job, stages: Runner, made: Networks) -> None:
    """Take a graph to its device: build, push, measure, judge, and commit or go back; raises like :func:`run`."""
    there, bench = fastest(job, stages, made)
    regression = measurement.regressed(job, stages, there)
    verdict = measurement.judge(job, there, bench.meta | regression)
    stages.judged(verdict, regression)
    report(stages, made, bench)
    stages.committed(commit(job, verdict, there))


def fastest(job: Job, stages: Runner, made: Networks) -> tuple[Delivered, Artifact]:
    """Deliver and measure an engine of the target's runtime and one of each alternative; return the fastest.

    One that breaks the contract is taken only where all of them do.
    """

    def measured(job: Job, stages: Runner) -> tuple[tuple[bool, float], Delivered, Artifact]:
        there = bring(job, stages, made)
        bench = stages.need(measurement.measure(job, stages, there))
        median = stages.runtimes[job.target.runtime] = bench.meta["latency_ms"]["p50"]
        verdict = measurement.judge(job, there, bench.meta | {"regression": None})
        return (verdict.status == "failed", median["value"] or math.inf), there, bench

    rank, there, bench = measured(job, stages)
    for runtime in job.target.alternatives:
        beside = stages.beside()
        try:
            if runtime not in there.device.facts()["runtimes"]:
                raise StageError(f"it is not installed on {there.device.name}")
            found = measured(replace(job, target=job.target.using(runtime)), beside)
        except StageError as problem:
            stages.console.warn(f"{places.NAMES[runtime]} is not measured: {problem.message}")
        else:
            if found[0] < rank:
                stages.take(beside)
                rank, there, bench = found
    return there, bench


def bring(job: Job, stages: Runner, made: Networks) -> Delivered:
    """Build the engine and push its release, which does not become current by that."""
    place = stages.prepared(places.choose(job.target, job.build))
    if job.target.where == "device":
        stages.hold(place.device, job)
    engine = stages.need(build(job, stages, made, place))
    device = place.device if job.target.where == "device" else stages.prepared(destination(job)).device
    stages.hold(device, job)
    engine = fit(job, stages, made, engine, device)
    release = compose(job, made, engine)
    return Delivered(made, engine, release, device, push(job, stages, release, device))


def compare(job: Job, stages: Runner, against: str) -> None:
    """Measure a job's engine in turns with another one on its device; nothing is committed.

    Args:
        job: Its engine, the one that a run would ship, is built and pushed when it is not there.
        stages: Runs what is missing.
        against: ``current``, ``baseline`` (the unpruned network, in fp32), or how a release's id begins.

    Raises:
        UsageError: There is no such release on the device, or it is this one.
    """
    other = None if against == "baseline" else installed(destination(job).device, against)
    made = networks.compress(job, stages)
    there = fastest(job, stages, made)[0] if job.target.alternatives else bring(job, stages, made)
    if other is None:
        aside = stages.aside()
        other = bring(replace(job, precision="fp32"), aside, networks.unpruned(job, aside, made)).release.id
    if other == there.release.id:
        raise UsageError(f"release {other} is the one to compare", "give --against another release, or baseline")
    measurement.compared(job, stages, there, other)


def installed(device: Device, name: str) -> str:
    """Return the id of a release on a device: of the ``current`` one, or of the one whose id begins like that."""
    return upkeep.named(upkeep.listed(Agent(device)), name, device.name).id


def foresee(job: Job, stages: Runner) -> None:
    """Say before the first expensive stage what will end the run at a later one; bring the image already."""
    target = job.target
    checks: list[tuple[str, Callable[[], object]]] = [
        ("build", lambda: stages.prepared(places.choose(target, job.build))),
        ("push", lambda: stages.prepared(destination(job))),
    ]
    if target.host not in (None, "local"):
        from toolkit import doctor

        first = 0 if target.where == "device" else 1
        check = (checks[first][0], lambda: doctor.require(open_device(target.host, target, job.build), target))
        checks.insert(first, check)
    for stage, look in checks:
        if stages.until in STAGES[: STAGES.index(stage)]:
            return
        try:
            look()
        except StageError as problem:
            remedy = f"; hint: {problem.hint}" if problem.hint else ""
            stages.console.warn(f"the run will end before '{stage}': {problem.message}{remedy}")
            return


def destination(job: Job) -> Place:
    """Return where the release is to run; raises StageError when that is no such device, or cannot be reached."""
    target = job.target
    device = open_device(target.host, target, job.build)
    if not target.on_cpu:
        places.require_gpu(target, device, f"push, bench and commit need the device ({target.compute_capability})")
    return places.native_or_contained(target, device, "the release runs there")


def build(job: Job, stages: Runner, made: Networks, place: Place) -> Artifact:
    """Build the engine; the artifact is of what it is built from, by which runtime, for which device."""
    batches = job.profile.benchmark.batches
    fixed = made.exported.meta.get("batch") == 1
    order = engines.Order(
        target=job.target,
        precision=job.precision,
        input=made.exported.meta.get("input"),
        batches=None if fixed else {"min": 1, "opt": batches[0], "max": max(batches)},
    )
    return stages.make(
        "build",
        order.request() | {"place": engines.identity(order, place.device.facts())},
        {"graph": made.graph},
        lambda work: engines.build(work, made.graph, order, place.device, stages.store.root / ".timing"),
        amount=1,
    )


def fit(job: Job, stages: Runner, made: Networks, engine: Artifact, device: Device) -> Artifact:
    """Return the engine when it fits the device; one that does not is built there, if that was asked for."""
    hint = "rebuild it on the device: the same command with --rebuild-stale"
    problem = mismatch(engine.meta["fingerprint"], device.facts())
    if problem is not None and job.rebuild_stale:
        stages.console.warn(f"the engine does not fit {device.name}: {problem}; building it there")
        engine = stages.need(build(job, stages, made, Place(device, "the engine did not fit")))
        hint = f"correct the target: toolkit targets show {job.target.name}"
        problem = mismatch(engine.meta["fingerprint"], device.facts())
    if problem is not None:
        raise StageError(f"the engine does not fit {device.name}: {problem}", hint)
    return engine


def compose(job: Job, made: Networks, engine: Artifact) -> Release:
    """Put together what goes to the device."""
    artifacts = {**vars(made), "engine": engine}
    del artifacts["reference"]  # a release is not made from it, and is the same whichever host computed it
    about = {
        "workload": {"model": str(job.model), "data": job.data.kind, "seed": job.seed},
        "profile": job.profile.name,
        "contract": job.profile.contract.model_dump(),
        "provenance": {
            "artifacts": {name: artifact.digest for name, artifact in artifacts.items() if artifact},
            "versions": made.exported.versions,
        },
    }
    return delivery.compose(engine, made.data, about=about, fast=job.fast)


def push(job: Job, stages: Runner, release: Release, device: Device) -> delivery.Pushed:
    """Bring the release to the device; it does not become current by that."""
    there = f"{device.root}/releases/{release.id}/manifest.json"
    return stages.push(
        release.id, device.exists(there), lambda p: delivery.push(release, Agent(device), p, job.target)
    )


def report(stages: Runner, made: Networks, bench: Artifact) -> None:
    """Draw the pictures; the page itself is written when the run is over and everything is known."""
    if not stages.draws and stages.verdict:
        stages.skip("report", f"contract {stages.verdict.status}; a fleet has no page")
        return

    def make(work: Work) -> dict[str, Any]:
        from toolkit.report import figures

        return figures.draw(work.out, inputs, stages.store.root / ".vega")

    shown = {
        "data": made.data,
        "train": made.baseline,
        "prune": made.pruned,
        "finetune": made.tuned,
        "bench": bench,
    }
    inputs = {name: artifact for name, artifact in shown.items() if artifact}
    stages.make("report", {}, inputs, make)


def commit(job: Job, verdict: Verdict, there: Delivered) -> Commitment:
    """Make the release current when it has kept its contract; otherwise leave, or go back to, what was.

    Whatever is switched to has to pass a health check, or the switch is undone.
    """
    release, device, pushed = there.release, there.device, there.pushed
    current, previous = pushed.current, pushed.previous
    if verdict.status == "undecided":
        return Commitment(False, "the contract is undecided; what was current stays", current, previous)
    if verdict.status == "failed":
        if current == release.id and previous is not None:
            try:
                upkeep.activate(previous, Agent(device))
            except UnhealthyError as problem:
                reason = f"the contract is broken, and there is no way back: {problem.message}"
                return Commitment(False, reason, problem.current, problem.previous, healthy=False)
            return Commitment(False, f"the contract is broken; back to release {previous}", previous, current)
        return Commitment(False, "the contract is broken; what was current stays", current, previous)
    if job.fast and not job.allow_fast:
        return Commitment(False, "a fast run is not committed without --allow-fast", current, previous)
    if current == release.id and not pushed.unchecked:
        return Commitment(True, "it is the current release already", current, previous)
    try:
        switched = upkeep.activate(release.id, Agent(device))
    except UnhealthyError as problem:
        return Commitment(False, problem.message, problem.current, problem.previous, healthy=False)
    return Commitment(True, "it kept its contract", switched["current"], switched["previous"])
