"""What is measured of a release on its device, as stages: by itself, beside another one, against its contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.bench import contract
from toolkit.bench.contract import Verdict
from toolkit.delivery.release import Pushed, Release
from toolkit.devices import Device
from toolkit.devices.agent import Agent, pack
from toolkit.job import Job
from toolkit.networks import Networks
from toolkit.stages import Runner
from toolkit.store import Artifact, Work, sha256_text

# of the device; what was measured there depends on them
_TOLD = ("arch", "cpu", "cores", "os", "runtimes", "gpus", "driver", "cuda", "l4t", "jetpack", "power_mode")


@dataclass(frozen=True)
class Delivered:
    """A release on its device, not current by that.

    Attributes:
        networks: What the engine was built from.
        engine: The engine.
        release: It.
        device: Where it is.
        pushed: What the push found there.
    """

    networks: Networks
    engine: Artifact
    release: Release
    device: Device
    pushed: Pushed


def measure(job: Job, stages: Runner, there: Delivered) -> Artifact:
    """Have the agent measure the release, again where an earlier measurement leaves the contract undecided."""
    asked, benchmark = job.profile.contract, job.profile.benchmark
    if there.networks.exported.meta["batch"] != "dynamic":
        benchmark = benchmark.model_copy(update={"batches": [1]})

    def undecided(meta: Mapping[str, Any]) -> bool:
        return contract.undecided_by_time(judge(job, there, {**meta, "regression": None}))

    def make(work: Work) -> dict[str, Any]:
        from toolkit.bench import measuring

        plan = measuring.Plan(
            benchmark,
            job.target.tuning(),
            asked.scenario,
            asked.confidence,
            job.precision,
            job.target.runtime,
        )
        found = measuring.measure(work, there.networks, there.release, Agent(there.device), plan, undecided)
        return found | {"device": _device(there)}

    config = {
        "benchmark": benchmark.model_dump(),
        "scenario": asked.scenario,
        "confidence": asked.confidence,
        **_conditions(job, there),
    }
    inputs = {name: artifact for name, artifact in vars(there.networks).items() if artifact}
    inputs["engine"] = there.engine
    return stages.make("bench", config, inputs, make, amount=1, stale=lambda found: undecided(found.meta))


def judge(job: Job, there: Delivered, bench: Mapping[str, Any]) -> Verdict:
    """Hold what was measured against the contract."""
    size = there.engine.meta["bytes"]
    return contract.judge(job.profile.contract, bench, there.networks.reference_accuracy, size)


def regressed(job: Job, stages: Runner, there: Delivered) -> dict[str, Any]:
    """Compare the release with the current one, if the contract asks for it and there is another."""
    current = there.pushed.current
    asked = job.profile.contract
    if asked.max_regression is None:
        stages.skip("compare", "not needed: the contract has no max_regression")
    elif current in (None, there.release.id):
        stages.skip("compare", "not needed: no other release is current on the device")
    else:
        found = compared(job, stages, there, current, lambda so_far: contract.regression_undecided(asked, so_far))
        return {"regression": found.meta}
    return {"regression": None}


def compared(
    job: Job,
    stages: Runner,
    there: Delivered,
    against: str,
    undecided: Callable[[Mapping[str, Any]], bool] = lambda found: False,
) -> Artifact:
    """Have the agent measure the release and another one in turns."""
    benchmark = job.profile.benchmark
    request = {
        "warmup_ms": benchmark.warmup,
        "period_ms": benchmark.period if job.profile.contract.scenario == "DutyCycle" else None,
        "tuning": job.target.tuning(),
    }

    def make(work: Work) -> dict[str, Any]:
        from toolkit.bench import comparing

        releases, limit = (against, there.release.id), benchmark.time_limit
        return comparing.compare(work, releases, Agent(there.device), request, limit, undecided)

    config = {"against": against, "request": request, **_conditions(job, there)}
    inputs = {"engine": there.engine}
    return stages.make("compare", config, inputs, make, amount=1, stale=lambda found: undecided(found.meta))


def _conditions(job: Job, there: Delivered) -> dict[str, Any]:
    """Return what a measurement depends on beside the release."""
    return {
        "tuning": job.target.tuning(),
        "agent": sha256_text(pack().hex()),
        "device": [there.device.name, *_device(there).values()],
    }


def _device(there: Delivered) -> dict[str, Any]:
    facts = there.device.facts()
    return {key: facts[key] for key in _TOLD}
