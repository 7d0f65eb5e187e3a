"""A run from outside: executes a job, keeps its record, writes its report; plans."""

from __future__ import annotations

import contextlib
import logging
import secrets
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from toolkit import pipeline, units
from toolkit.console import Console
from toolkit.engines import places
from toolkit.errors import ToolkitError, UsageError, disk_errors
from toolkit.job import Job
from toolkit.report import document
from toolkit.rollout import Rollout
from toolkit.stages import Planner, Reached, Runner, silenced
from toolkit.store import Store, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of a run or a plan; ``picture`` shows a terminal the latencies, where they were measured."""

    document: dict[str, Any]
    error: ToolkitError | None
    exit_code: int
    picture: str = ""


def execute(
    job: Job,
    until: str = "commit",
    console: Console | None = None,
    rerun: frozenset[str] = frozenset(),
    parallel: int = 8,
    waves: str | None = None,
) -> Outcome:
    """Run a job, on every host of its target's fleet if it is one, and record it below ``BUILD/runs``.

    Args:
        job: What to do.
        until: The stage to end with; ``commit`` for all.
        console: Who is told of progress.
        rerun: Stages to make anew.
        parallel: How many hosts are at work at a time.
        waves: How a fleet is cut; see :func:`toolkit.delivery.fleet.waves`.

    Returns:
        The run's document, the error that ended it if one did, and the exit code: 0 for a kept contract (or
        a stage that was reached), 1 for a broken one, a failed stage or a release that does not run after its
        switch, on any host of a fleet, 2 for wrong input.
    """
    console = console or Console(quiet=True)
    store = Store(job.build / "store")
    stages = Runner(store, console, until, rerun, job.fast)
    name = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{job.target.name}-{secrets.token_hex(2)}"
    folder = job.build / "runs" / name
    if job.fast:
        console.say("fast run: a short recipe on part of the data")
    rollout = Rollout.of(job, stages, parallel, waves) if job.target.fleet or waves else None
    error: ToolkitError | None = None
    picture = ""
    with disk_errors(job.build, "the run's record"), store.in_use(), silenced():
        try:
            if rollout is not None:
                rollout.run()
            else:
                pipeline.foresee(job, stages)
                with stages.leases:
                    pipeline.run(job, stages)
        except Reached:
            log.info("reached %s", until)
        except ToolkitError as caught:
            error = caught
            seen = {done.name for done in stages.done}
            left = [stage for stage in pipeline.stages_of(job, until) if stage not in seen]
            if rollout is None:
                console.say(f"not done: {', '.join(left)}; the rest is kept")
        record = document.assemble(name, job, stages, rollout.hosts if rollout else None, error)
        if stages.done:
            folder.mkdir(parents=True)
            if pictures := stages.artifacts.get("report"):
                from toolkit.report import page

                record["report"] = str(folder / "report.html")
                picture = pictures.meta["picture"]
                page.write(folder, record, pictures)
            write_json(folder / "run.json", record)
    if error is not None:
        return Outcome(record, error, error.exit_code, picture)
    kept = stages.kept if rollout is None else all(host.good for host in rollout.hosts)
    return Outcome(record, None, 0 if kept else 1, picture)


def compare(job: Job, against: str, console: Console, rerun: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Measure a job's engine in turns with another one on its device; see :func:`pipeline.compare`.

    Returns:
        ``target``, and what :func:`comparing.compare` says.

    Raises:
        UsageError: A fleet is meant, or there is nothing to compare with.
        ToolkitError: Something on the way failed; what was made is kept.
    """
    if job.target.fleet:
        raise UsageError("two engines are compared on one device, and a fleet is meant", "give --host")
    store = Store(job.build / "store")
    stages = Runner(store, console, "compare", rerun, job.fast)
    with disk_errors(job.build, "a comparison"), store.in_use(), silenced():
        pipeline.foresee(job, stages)
        with stages.leases, contextlib.suppress(Reached):
            pipeline.compare(job, stages, against)
    return {"target": job.target.name, **stages.artifacts["compare"].meta}


def plan(job: Job, rerun: frozenset[str] = frozenset()) -> Outcome:
    """Say what a run of the job would do, for a fleet on its first host; nothing is written.

    Returns:
        A document with ``host`` (None for this machine), ``stages`` (name, cached, seconds, artifact, text),
        ``build`` (where the engine is built, why, and the commands there, a line each), ``seconds`` (estimated for
        what would run) and ``complete`` (whether every stage's time is known).
    """
    if job.target.fleet:
        job = job.at(job.target.fleet[0])
    planner = Planner(Store(job.build / "store"), Console(quiet=True), "report", rerun, job.fast)
    error: ToolkitError | None = None
    try:
        pipeline.run(job, planner)
    except Reached:
        log.info("planned")
    except UsageError:
        raise
    except ToolkitError as caught:
        error = caught
    seen = [done.name for done in planner.done]
    stages = [vars(done) for done in planner.done]
    if error is None:
        order = pipeline.stages_of(job, "report")
        for name in order:
            # what comes after the last one comes again, for a second runtime
            if name not in seen or order.index(name) > order.index(seen[-1]):
                seconds = planner.estimate(name, {}, 1) or 0.0
                text = f"would run (about {units.duration(seconds)})" if seconds else "would run"
                stages.append({"name": name, "cached": False, "seconds": seconds, "artifact": None, "text": text})
    pending = [stage for stage in stages if not stage["cached"]]
    record = {
        "target": job.target.name,
        "host": job.target.host,
        "stages": stages,
        "build": places.explain(job.target, job.build),
        "seconds": round(sum(stage["seconds"] for stage in pending), 1),
        "complete": all(stage["seconds"] for stage in pending),
        "error": {"message": error.message, "hint": error.hint} if error else None,
    }
    return Outcome(record, error, error.exit_code if error else 0)
