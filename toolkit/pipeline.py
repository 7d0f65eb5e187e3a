"""The product: train → prune → finetune → export → quantize → build → push → bench → judge → commit | rollback.

Each stage is asked of the store first and made when it is not there. What a stage is made from stands in its
line: configuration, input artifacts, and the function that makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit import compression, engines
from toolkit.bench import contract
from toolkit.bench.contract import Verdict
from toolkit.config import Model
from toolkit.delivery import release as delivery
from toolkit.delivery.release import Commitment, Release
from toolkit.devices import Device, open_device
from toolkit.devices.agent import Agent, pack
from toolkit.job import Job
from toolkit.stages import Runner
from toolkit.store import Artifact, Work, sha256_text

STAGES = (
    "data", "check", "train", "prune", "finetune", "export", "quantize", "build", "push", "bench", "report",
)  # fmt: skip


@dataclass(frozen=True)
class Networks:
    """What compression leaves: the data, the network at each step, and the graph to build from."""

    data: Artifact
    baseline: Artifact
    pruned: Artifact
    tuned: Artifact
    graph: Artifact


def run(job: Job, stages: Runner) -> None:
    """Take a workload through every stage, up to the one that ``stages`` ends with.

    Raises:
        Reached: The last stage that was asked for is done; ``stages`` holds what was made.
        ToolkitError: Something that the user can act on; everything made before it is kept.
    """
    engines.require_precision(job.target, job.precision)
    networks = compress(job, stages)
    builder = engines.require_buildable(job.target)
    device = open_device(job.target, job.build)
    engine = stages.need(build(job, stages, networks, device, builder))
    release = compose(job, networks.data, engine)
    pushed = push(stages, release, device)
    bench = stages.need(measure(job, stages, networks, engine, release, device))
    verdict = contract.judge(
        job.profile.contract, bench.meta, networks.baseline.meta["accuracy"], engine.meta["bytes"]
    )
    stages.judged(verdict)
    report(stages, networks, bench)
    stages.committed(commit(job, stages, verdict, release, device, pushed))


def compress(job: Job, stages: Runner) -> Networks:
    """Train, prune, fine-tune, export and quantise: all that does not depend on a device."""
    profile, recipe, seed = job.profile, job.recipe, job.seed
    size, divisor = profile.input_size, profile.channel_divisor
    content = compression.data.fingerprint(job.data, stages.store.root / ".index", remember=stages.writes)
    model = {"model": compression.sources.identify(job.model)}

    data = stages.make(
        "data",
        {"data": content, "size": size},
        {},
        lambda work: compression.data.prepare(work, job.data, size, job.build / "downloads"),
    )
    check = stages.make(
        "check",
        model | {"divisor": divisor},
        {"data": data},
        lambda work: compression.pruning.check(data, job.model, divisor),
    )
    if check.meta:
        compression.budget.require_reachable(check.meta, job.budget, divisor)
    images = _images(data, recipe.train_images)
    baseline = stages.make(
        "train",
        model | {"recipe": recipe.model_dump(exclude=_NOT_TRAINING), "seed": seed, "fast": job.fast},
        {"data": data},
        lambda work: compression.training.train(work, data, job.model, recipe, seed),
        amount=images * recipe.epochs,
    )
    pruned = stages.make(
        "prune",
        model
        | {
            "budget": job.budget.model_dump(),
            "divisor": divisor,
            "pruner": profile.pruner,
            "recipe": recipe.model_dump(include={"train_images", "val_images", "search_images"}),
            "seed": seed,
            "fast": job.fast,
        },
        {"data": data, "baseline": baseline},
        lambda work: compression.pruning.prune(
            work, data, job.model, baseline, recipe, job.budget, divisor, stages.store.root / ".search", seed
        ),
        amount=1,
    )
    tuned = stages.make(
        "finetune",
        model
        | {
            "recipe": recipe.model_dump(exclude={"epochs", "search_images"}),
            "seed": seed,
            "fast": job.fast,
        },
        {"data": data, "baseline": baseline, "pruned": pruned},
        lambda work: compression.training.finetune(work, data, job.model, baseline, pruned, recipe, seed),
        amount=images * recipe.finetune_epochs,
    )
    exported = stages.make(
        "export",
        model | {"fast": job.fast},
        {"data": data, "tuned": tuned},
        lambda work: _export(work, data, job.model, tuned),
        amount=1,
    )
    if job.precision == "fp32":
        stages.skip("quantize", "not needed for fp32")
        return Networks(data, baseline, pruned, tuned, exported)
    spelling = engines.find(job.target.runtime).spelling
    graph = stages.make(
        "quantize",
        {"precision": job.precision, "spelling": spelling, "images": profile.calibration_images},
        {"data": data, "exported": exported},
        lambda work: compression.quantization.quantize(
            work, data, exported, job.precision, spelling, profile.calibration_images
        ),
        amount=1,
    )
    return Networks(data, baseline, pruned, tuned, graph)


def _export(work: Work, data: Artifact, model: Model, tuned: Artifact) -> dict[str, Any]:
    from toolkit import export  # PyTorch with it

    return export.export(work, data, model, tuned)


def build(job: Job, stages: Runner, networks: Networks, device: Device, builder: engines.Build) -> Artifact:
    """Build the engine for the device that it will run on."""
    facts = device.facts()
    return stages.make(
        "build",
        {
            "runtime": job.target.runtime,
            "version": facts["runtimes"].get(job.target.runtime),
            "threads": job.target.threads,
            "precision": job.precision,
            "device": [facts["arch"], facts["cpu"]],
        },
        {"graph": networks.graph},
        lambda work: builder(
            work, networks.graph, job.target, Agent(device), job.precision, job.profile.input_size
        ),
        amount=1,
    )


def compose(job: Job, data: Artifact, engine: Artifact) -> Release:
    """Put together what goes to the device."""
    about = {
        "workload": {"model": str(job.model), "data": job.data.kind, "seed": job.seed},
        "profile": job.profile.name,
        "contract": job.profile.contract.model_dump(),
    }
    return delivery.compose(engine, data, about=about, fast=job.fast)


def push(stages: Runner, release: Release, device: Device) -> delivery.Pushed:
    """Bring the release to the device; it does not become current by that."""
    there = f"{device.root}/releases/{release.id}/manifest.json"
    return stages.push(release.id, device.exists(there), lambda p: delivery.push(release, Agent(device), p))


def measure(
    job: Job, stages: Runner, networks: Networks, engine: Artifact, release: Release, device: Device
) -> Artifact:
    """Have the agent measure the release on the device."""
    from toolkit.bench import statistics

    facts = device.facts()
    settings = {
        "warmup_ms": job.profile.benchmark.warmup,
        "duration_ms": job.profile.benchmark.duration,
        "queries": job.profile.benchmark.queries,
        "batches": job.profile.benchmark.batches,
    }

    def make(work: Work) -> dict[str, Any]:
        result = delivery.bench(release, Agent(device), settings, work.out, work.progress)
        latencies = statistics.load(work.out / "latencies.npy")
        best = max(result["throughput"], key=lambda entry: float(entry["samples_per_s"]))
        return result | {
            "scenario": "SingleStream",
            "samples": len(latencies),
            "latency_ms": statistics.summarise(latencies),
            "throughput": best,
            "batches": result["throughput"],
            "device": {key: facts[key] for key in ("arch", "cpu", "cores", "os", "runtimes")},
        }

    config = {
        "settings": settings,
        "agent": sha256_text(pack().hex()),
        "device": [device.name, facts["arch"], facts["cpu"], facts["cores"], facts["runtimes"]],
    }
    return stages.make("bench", config, {"engine": engine, "data": networks.data}, make, amount=1)


def report(stages: Runner, networks: Networks, bench: Artifact) -> None:
    """Draw the pictures; the page itself is written when the run is over and everything is known."""

    def make(work: Work) -> dict[str, Any]:
        from toolkit.report import figures

        return figures.draw(work.out, networks.baseline, networks.pruned, networks.tuned, bench)

    inputs = {"baseline": networks.baseline, "pruned": networks.pruned, "tuned": networks.tuned, "bench": bench}
    stages.make("report", {}, inputs, make)


def commit(
    job: Job, stages: Runner, verdict: Verdict, release: Release, device: Device, pushed: delivery.Pushed
) -> Commitment:
    """Make the release current when it has kept its contract; otherwise leave, or go back to, what was."""
    current, previous = pushed.current, pushed.previous
    if not verdict.passed:
        if current == release.id and previous is not None:
            delivery.switch(previous, Agent(device))
            return Commitment(False, f"the contract is broken; back to release {previous}", previous, current)
        return Commitment(False, "the contract is broken; what was current stays", current, previous)
    if job.fast and not job.allow_fast:
        return Commitment(False, "a fast run is not committed without --allow-fast", current, previous)
    if current == release.id:
        return Commitment(True, "it is the current release already", current, previous)
    switched = delivery.switch(release.id, Agent(device))
    return Commitment(True, "it kept its contract", switched["current"], switched["previous"])


_NOT_TRAINING = {"finetune_epochs", "teacher", "temperature", "search_images"}


def _images(data: Artifact, limit: int | None) -> int:
    """Return how many training images a recipe uses; 0 while nobody knows."""
    count = int(data.meta["counts"]["train"]) if data.meta else 0
    return count if limit is None else min(count, limit)
