"""A run as one JSON document; its schema is run.schema.json beside this file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.job import Job
from toolkit.rollout import Host
from toolkit.stages import Runner

FORMAT = 2  # raised when a reader of older documents would go wrong
SCHEMA = Path(__file__).with_name("run.schema.json")
_BENCH = (
    "scenario", "samples", "confidence", "method", "latency_ms", "scenarios", "throughput", "batches", "power",
    "stability", "early_stopping", "warmup", "load_ms", "first_ms", "overhead_ns", "peak_memory_bytes", "accuracy",
    "top5", "not_measured", "agreement", "attribution", "staircase", "images", "provider", "settings", "layers",
    "notes", "tuning", "conditions", "ran", "device", "rounds",
)  # fmt: skip


def assemble(
    run: str, job: Job, stages: Runner, hosts: Sequence[Host] | None, error: ToolkitError | None
) -> dict[str, Any]:
    """Return the document of a run, finished or not; what was not reached is null.

    Args:
        run: Its name.
        job: What was asked for.
        stages: What was made.
        hosts: What became of a fleet's hosts; None for a run on one device.
        error: Why it ended early, if it did.
    """
    made = {name: artifact.meta for name, artifact in stages.artifacts.items()}
    return {
        "format": FORMAT,
        "run": run,
        "target": job.target.name,
        "profile": job.profile.name,
        "workload": {"model": str(job.model), "data": str(job.data), "seed": job.seed},
        "budget": str(job.budget) if job.model.trainable else None,
        "fast": job.fast,
        "model": {
            "baseline": _network(made.get("train")),
            "pruned": _network(made.get("prune")),
            "final": _network(made.get("finetune")),
        },
        **_made(stages, error),
        "report": None,
        **({} if hosts is None else {"hosts": [_host(host) for host in hosts]}),
    }


def _made(stages: Runner, error: ToolkitError | None) -> dict[str, Any]:
    """Return what a device has to do with, beside the account of the stages."""
    engine, bench = stages.artifacts.get("build"), stages.artifacts.get("bench")
    return {
        "engine": None
        if engine is None
        else {
            "runtime": engine.meta["runtime"],
            "precision": engine.meta["precision"],
            "provider": engine.meta["provider"],
            "bytes": engine.meta["bytes"],
            "fingerprint": engine.meta["fingerprint"],
            "sha256": engine.sha256(engine.meta["file"]),
            "runtimes": stages.runtimes,
        },
        "bench": None if bench is None else {key: bench.meta[key] for key in _BENCH} | stages.regression,
        "verdict": stages.verdict.as_json() if stages.verdict else None,
        "commit": vars(stages.commitment) | {"release": stages.release} if stages.commitment else None,
        "stages": [
            {"name": d.name, "cached": d.cached, "seconds": d.seconds, "artifact": d.artifact, "text": d.text}
            for d in stages.done
        ],
        "artifacts": {name: a.key for name, a in stages.artifacts.items()},
        "error": {"message": error.message, "hint": error.hint} if error else None,
    }


def _host(host: Host) -> dict[str, Any]:
    told = {"host": host.name, "wave": host.wave, "status": host.status, "reason": host.reason}
    return told | {"current": host.current} | _made(host.stages, host.error)


def _network(meta: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return {key: meta[key] for key in ("accuracy", "macs", "flops", "params")} if meta else None
