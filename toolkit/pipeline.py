"""The product: train → prune → finetune → export → quantize → build → push → bench → judge → commit | rollback.

Each stage is asked of the store first and made when it is not there. What a stage is made from stands in its
line: configuration, input artifacts, and the function that makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from toolkit import compression, engines
from toolkit.agent.engine import mismatch
from toolkit.bench import contract
from toolkit.bench.contract import Verdict
from toolkit.config import Model
from toolkit.delivery import release as delivery
from toolkit.delivery import upkeep
from toolkit.delivery.release import Commitment, Release
from toolkit.delivery.upkeep import UnhealthyError
from toolkit.devices import Device, open_device
from toolkit.devices.agent import Agent, pack
from toolkit.engines import places
from toolkit.engines.places import Place
from toolkit.errors import StageError
from toolkit.job import Job
from toolkit.stages import Runner
from toolkit.store import Artifact, Work, sha256_text

STAGES = (
    "data", "check", "train", "prune", "finetune", "export", "quantize", "build", "push", "bench", "report",
)  # fmt: skip


@dataclass(frozen=True)
class Networks:
    """What compression leaves; a user's ONNX file was never a network of ours, so that three of them are None.

    Attributes:
        data: The images, and what is known of them.
        baseline: The unpruned network.
        pruned: The pruned one.
        tuned: The pruned one after fine-tuning.
        exported: The fp32 graph, which device and host are held against.
        graph: What the engine is built from: ``exported``, or the same in another precision.
    """

    data: Artifact
    baseline: Artifact | None
    pruned: Artifact | None
    tuned: Artifact | None
    exported: Artifact
    graph: Artifact

    @property
    def reference_accuracy(self) -> float | None:
        """Accuracy that a drop is counted from, 0 to 1; None where the data have no labels."""
        accuracy: float | None = (self.baseline or self.exported).meta["accuracy"]
        return accuracy


def run(job: Job, stages: Runner) -> None:
    """Take a workload through every stage, up to the one that ``stages`` ends with.

    Raises:
        Reached: The last stage that was asked for is done; ``stages`` holds what was made.
        ToolkitError: Something that the user can act on; everything made before it is kept.
    """
    deliver(job, stages, compress(job, stages))


def deliver(job: Job, stages: Runner, networks: Networks) -> None:
    """Take a graph to its device: build, push, measure, judge, and commit or go back; raises like :func:`run`."""
    place = stages.prepared(places.choose(job.target, job.build))
    if job.target.where == "device":
        stages.hold(place.device, job)
    engine = stages.need(build(job, stages, networks, place))
    device = place.device if job.target.where == "device" else stages.prepared(destination(job)).device
    stages.hold(device, job)
    engine = fit(job, stages, networks, engine, device)
    release = compose(job, networks, engine)
    pushed = push(job, stages, release, device)
    bench = stages.need(measure(job, stages, networks, engine, release, device))
    verdict = contract.judge(job.profile.contract, bench.meta, networks.reference_accuracy, engine.meta["bytes"])
    stages.judged(verdict)
    report(stages, networks, bench)
    stages.committed(commit(job, stages, verdict, release, device, pushed))


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


def compress(job: Job, stages: Runner) -> Networks:
    """Train, prune, fine-tune, export and quantise: all that does not depend on a device."""
    engines.require_precision(job.target, job.precision)
    networks = shrink(job, stages) if job.model.trainable else take_over(job, stages)
    if job.precision == "fp32":
        stages.skip("quantize", "not needed for fp32")
        return networks
    spelling, images = engines.spelling(job.target), job.profile.calibration_images
    data, exported = networks.data, networks.exported
    graph = stages.make(
        "quantize",
        {"precision": job.precision, "spelling": spelling, "images": images},
        {"data": data, "exported": exported},
        lambda work: compression.quantization.quantize(work, data, exported, job.precision, spelling, images),
        amount=1,
    )
    return replace(networks, graph=graph)


def take_over(job: Job, stages: Runner) -> Networks:
    """Take over a user's ONNX file, which is neither trained nor pruned."""
    from toolkit import adopt, onnxfile  # onnx with them

    source = onnxfile.read(job.model, job.profile.input_size, job.precision)
    data = prepare(job, stages, source.size)
    for name in ("check", "train", "prune", "finetune"):
        stages.skip(name, "not needed: the model is an ONNX file")
    normalization = job.model.normalization and job.model.normalization.model_dump()
    exported = stages.make(
        "export",
        {
            "model": {"source": "onnx", "content": source.digest},
            "normalization": normalization,
            "size": source.size,
        },
        {"data": data},
        lambda work: adopt.adopt(work, data, job.model, source),
        amount=1,
    )
    return Networks(data, None, None, None, exported, exported)


def prepare(job: Job, stages: Runner, size: int) -> Artifact:
    """Read the data, every image brought to ``size`` pixels."""
    content = compression.data.fingerprint(job.data, stages.store.root / ".index", remember=stages.writes)
    return stages.make(
        "data",
        {"data": content, "size": size},
        {},
        lambda work: compression.data.prepare(work, job.data, size, job.build / "downloads"),
    )


def shrink(job: Job, stages: Runner) -> Networks:
    """Train a network, prune it to the budget, fine-tune and export it."""
    profile, recipe, seed = job.profile, job.recipe, job.seed
    divisor = profile.channel_divisor
    model = {"model": compression.sources.identify(job.model)}

    data = prepare(job, stages, profile.input_size)
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
    return Networks(data, baseline, pruned, tuned, exported, exported)


def _export(work: Work, data: Artifact, model: Model, tuned: Artifact) -> dict[str, Any]:
    from toolkit import export  # PyTorch with it

    return export.export(work, data, model, tuned)


def destination(job: Job) -> Place:
    """Return where the release is to run; raises StageError when that is no such device, or cannot be reached."""
    target = job.target
    device = open_device(target.host, target, job.build)
    if target.runtime != "onnxruntime":
        places.require_gpu(target, device, f"push, bench and commit need the device ({target.compute_capability})")
    return places.native_or_contained(target, device, "the release runs there")


def build(job: Job, stages: Runner, networks: Networks, place: Place) -> Artifact:
    """Build the engine; the artifact is of what it is built from, by which runtime, for which device."""
    batches = job.profile.benchmark.batches
    fixed = networks.exported.meta.get("batch") == 1
    order = engines.Order(
        target=job.target,
        precision=job.precision,
        input=networks.exported.meta.get("input"),
        batches=None if fixed else {"min": 1, "opt": batches[0], "max": max(batches)},
    )
    return stages.make(
        "build",
        order.request() | {"place": engines.identity(order, place.device.facts())},
        {"graph": networks.graph},
        lambda work: engines.build(work, networks.graph, order, place.device, stages.store.root / ".timing"),
        amount=1,
    )


def fit(job: Job, stages: Runner, networks: Networks, engine: Artifact, device: Device) -> Artifact:
    """Return the engine when it fits the device; one that does not is built there, if that was asked for."""
    hint = "rebuild it on the device: the same command with --rebuild-stale"
    problem = mismatch(engine.meta["fingerprint"], device.facts())
    if problem is not None and job.rebuild_stale:
        stages.console.warn(f"the engine does not fit {device.name}: {problem}; building it there")
        engine = stages.need(build(job, stages, networks, Place(device, "the engine did not fit")))
        hint = f"correct the target: toolkit targets show {job.target.name}"
        problem = mismatch(engine.meta["fingerprint"], device.facts())
    if problem is not None:
        raise StageError(f"the engine does not fit {device.name}: {problem}", hint)
    return engine


def compose(job: Job, networks: Networks, engine: Artifact) -> Release:
    """Put together what goes to the device."""
    made = {**vars(networks), "engine": engine}
    about = {
        "workload": {"model": str(job.model), "data": job.data.kind, "seed": job.seed},
        "profile": job.profile.name,
        "contract": job.profile.contract.model_dump(),
        "provenance": {
            "artifacts": {name: artifact.digest for name, artifact in made.items() if artifact},
            "versions": networks.exported.versions,
        },
    }
    return delivery.compose(engine, networks.data, about=about, fast=job.fast)


def push(job: Job, stages: Runner, release: Release, device: Device) -> delivery.Pushed:
    """Bring the release to the device; it does not become current by that."""
    there = f"{device.root}/releases/{release.id}/manifest.json"
    return stages.push(
        release.id, device.exists(there), lambda p: delivery.push(release, Agent(device), p, job.target)
    )


def measure(
    job: Job, stages: Runner, networks: Networks, engine: Artifact, release: Release, device: Device
) -> Artifact:
    """Have the agent measure the release on the device."""
    from toolkit.bench import statistics

    data, exported, facts = networks.data, networks.exported, device.facts()
    settings = {
        "warmup_ms": job.profile.benchmark.warmup,
        "duration_ms": job.profile.benchmark.duration,
        "queries": job.profile.benchmark.queries,
        "batches": job.profile.benchmark.batches if exported.meta["batch"] == "dynamic" else [1],
        "tuning": job.target.tuning(),
    }

    def make(work: Work) -> dict[str, Any]:
        from toolkit.bench.agreement import PROBED, agreement, require_alike

        logits = delivery.probe(release, Agent(device), PROBED)
        if logits is not None:
            require_alike(networks.graph, data, logits, job.precision, device.name)
        result = delivery.bench(release, Agent(device), settings, work.out, work.progress)
        latencies, computed = statistics.load(work.out / "latencies.npy"), work.out / "logits.npy"
        best = max(result["throughput"], key=lambda entry: float(entry["samples_per_s"]))
        return result | {
            "scenario": "SingleStream",
            "samples": len(latencies),
            "latency_ms": statistics.summarise(latencies),
            "throughput": best,
            "batches": result["throughput"],
            "agreement": agreement(exported, data, computed, work.progress) if computed.exists() else None,
            "device": {key: facts[key] for key in _TOLD},
        }

    config = {
        "settings": settings,
        "agent": sha256_text(pack().hex()),
        "device": [device.name, *(facts[key] for key in _TOLD)],
    }
    return stages.make("bench", config, {"engine": engine, "data": data, "exported": exported}, make, amount=1)


def report(stages: Runner, networks: Networks, bench: Artifact) -> None:
    """Draw the pictures; the page itself is written when the run is over and everything is known."""
    if not stages.draws and stages.verdict:
        stages.skip("report", f"contract {stages.verdict.status}; a fleet has no page")
        return

    def make(work: Work) -> dict[str, Any]:
        from toolkit.report import figures

        return figures.draw(work.out, networks.baseline, networks.pruned, networks.tuned, bench)

    inputs = {"baseline": networks.baseline, "pruned": networks.pruned, "tuned": networks.tuned, "bench": bench}
    stages.make("report", {}, {name: artifact for name, artifact in inputs.items() if artifact}, make)


def commit(
    job: Job, stages: Runner, verdict: Verdict, release: Release, device: Device, pushed: delivery.Pushed
) -> Commitment:
    """Make the release current when it has kept its contract; otherwise leave, or go back to, what was.

    Whatever is switched to has to pass a health check, or the switch is undone.
    """
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


_TOLD = ("arch", "cpu", "cores", "os", "runtimes", "gpus", "driver", "cuda", "l4t", "jetpack", "power_mode")
_NOT_TRAINING = {"finetune_epochs", "teacher", "temperature", "search_images"}


def _images(data: Artifact, limit: int | None) -> int:
    """Return how many training images a recipe uses; 0 while nobody knows."""
    count = int(data.meta["counts"]["train"]) if data.meta else 0
    return count if limit is None else min(count, limit)
