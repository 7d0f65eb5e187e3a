"""What candidates a sweep has, which of them can be, and which one is to ship."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from toolkit import compression, engines, networks, pipeline
from toolkit.config import Flops, Precision, RuntimeName, Target
from toolkit.devices import Device
from toolkit.engines import places
from toolkit.errors import StageError, ToolkitError, UsageError
from toolkit.job import Job
from toolkit.stages import Reached, Runner

T = TypeVar("T")

_CPU: tuple[RuntimeName, ...] = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Axes:
    """What candidates differ in; every combination is one.

    Attributes:
        budgets: FLOPs budgets.
        precisions: Of the engine.
        pruners: Names of pruners.
        runtimes: That its device may have; none for the target's own, or the fastest of that and its alternatives.
    """

    budgets: Sequence[Flops]
    precisions: Sequence[Precision]
    pruners: Sequence[str]
    runtimes: Sequence[RuntimeName]


@dataclass(frozen=True)
class Candidate:
    """One combination.

    Attributes:
        label: What sets it apart from the others.
        job: It.
        flops: The budget in FLOPs; infinite for an ONNX file, which is not pruned.
    """

    label: str
    job: Job
    flops: float = math.inf

    def using(self, runtime: RuntimeName) -> Candidate:
        """Return it with this one of its target's runtimes."""
        job = replace(self.job, target=self.job.target.using(runtime))
        return replace(self, label=f"{self.label} {runtime}", job=job)


@dataclass(frozen=True)
class LeftOut:
    """A combination that cannot be, and why."""

    label: str
    reason: str
    hint: str | None

    def __str__(self) -> str:
        return f"{self.label} is left out: {self.reason}" + (f"; hint: {self.hint}" if self.hint else "")


def runtimes_for(target: Target) -> tuple[RuntimeName, ...]:
    """Return the runtimes that ``auto`` chooses between; raises UsageError where there is no choice."""
    if not target.on_cpu:
        raise UsageError(
            f"--runtime auto chooses between ONNX Runtime and OpenVINO, and {target.name} has a GPU",
            "leave it out, or name a runtime",
        )
    return _CPU


def lay_out(job: Job, axes: Axes, stages: Runner) -> tuple[list[Candidate], list[LeftOut]]:
    """Return the candidates that can be, and those that cannot.

    Args:
        job: What all of them share.
        axes: What they differ in.
        stages: Looks at the data and the model; ends with ``check``.

    Raises:
        ToolkitError: Whatever keeps every candidate from being.
    """
    found: list[Candidate] = []
    left_out: list[LeftOut] = []
    errors: list[ToolkitError] = []
    device_of = _once(lambda job: pipeline.destination(job).device)
    check_of = _once(lambda job: _checked(job, stages.aside()))
    every = [set(values) for values in (axes.budgets, axes.precisions, axes.pruners, axes.runtimes)]
    for runtime, pruner, budget, precision in itertools.product(
        dict.fromkeys(axes.runtimes) or [None],
        dict.fromkeys(axes.pruners),
        dict.fromkeys(axes.budgets),
        dict.fromkeys(axes.precisions),
    ):
        values = (budget, precision, pruner, runtime)
        apart = [str(value) for value, all_of in zip(values, every, strict=True) if len(all_of) > 1]
        label = " ".join(apart or [str(budget), precision])
        try:
            candidate = replace(
                job,
                target=job.target if runtime is None else job.target.using(runtime),
                profile=job.profile.model_copy(update={"pruner": pruner}),
                budget=budget,
                precision=precision,
            )
            engines.require_precision(candidate.target, precision)
            _require_runtime(candidate, device_of(candidate.target.runtime, candidate))
            limit = math.inf
            if job.model.trainable:
                known = check_of(pruner, candidate)
                compression.budget.require_reachable(known, budget, job.profile.channel_divisor)
                limit = budget.resolve(known["flops"])
        except ToolkitError as error:
            errors.append(error)
            left_out.append(LeftOut(label, error.message, error.hint))
        else:
            found.append(Candidate(label, candidate, limit))
    if not found and len({error.message for error in errors}) == 1:
        raise errors[0]
    return found, left_out


def _once(look: Callable[[Job], T]) -> Callable[[str, Job], T]:
    """Return what looks once for each name, and then says the same again, a failure too."""
    known: dict[str, T | ToolkitError] = {}

    def again(name: str, job: Job) -> T:
        if name not in known:
            try:
                known[name] = look(job)
            except ToolkitError as error:
                known[name] = error
        said = known[name]
        if isinstance(said, ToolkitError):
            raise said
        return said

    return again


def _require_runtime(job: Job, device: Device) -> None:
    """Raise StageError when a job's device cannot run its engine, as far as that is known now."""
    runtime = job.target.runtime
    if job.target.on_cpu and runtime not in device.facts()["runtimes"]:
        raise StageError(
            f"{places.NAMES[runtime]} is not installed on {device.name}",
            f"write 'runtime: {runtime}' into its target file, then toolkit provision {job.target.name}",
        )


def _checked(job: Job, stages: Runner) -> dict[str, Any]:
    """Return what is known of a job's model before any training."""
    with contextlib.suppress(Reached):
        networks.compress(job, stages)
    return stages.artifacts["check"].meta


def halve(found: Sequence[Candidate], score: Callable[[Candidate], float]) -> tuple[list[Candidate], list[LeftOut]]:
    """Return the candidates of the better half of each budget's networks, and the others (successive halving).

    Args:
        found: The candidates; those of the same budget and pruner have the same network.
        score: Validation accuracy of a candidate's network after little training; a ToolkitError leaves it out.
    """
    scores: dict[Flops, dict[str, float]] = {}
    errors: dict[tuple[Flops, str], ToolkitError] = {}
    for one in found:
        budget, pruner = one.job.budget, one.job.profile.pruner
        scored = scores.setdefault(budget, {})
        if pruner not in scored and (budget, pruner) not in errors:
            try:
                scored[pruner] = score(one)
            except ToolkitError as error:
                errors[budget, pruner] = error
    kept: list[Candidate] = []
    left_out: list[LeftOut] = []
    for one in found:
        budget, pruner = one.job.budget, one.job.profile.pruner
        if (budget, pruner) in errors:
            left_out.append(LeftOut(one.label, errors[budget, pruner].message, errors[budget, pruner].hint))
            continue
        scored = scores[budget]
        ranking = sorted(scored, key=lambda name: -scored[name])
        if ranking.index(pruner) < (len(ranking) + 1) // 2:
            kept.append(one)
        else:
            values = f"{scored[pruner]:.2%} of the validation images, with {ranking[0]} {scored[ranking[0]]:.2%}"
            left_out.append(LeftOut(one.label, f"after a short fine-tuning it is right on {values}", None))
    return kept, left_out


def choose(measured: Sequence[Mapping[str, Any]]) -> tuple[str | None, str]:
    """Return which of the candidates to ship, by its label, and why.

    It is the fastest one that keeps the contract and has no more accurate one beside it: one whose median is within
    its own interval. The other's interval does not count, or whoever is measured badly would stand beside everyone.
    What more accuracy costs is said of the fastest one that has at least half of what there is to gain: the last
    few images may cost many times as much.

    Args:
        measured: Of each candidate ``label``, ``verdict`` (``passed`` for a kept contract), ``p50`` (a figure, in
            ms; None where it was not measured) and ``accuracy`` (0 to 1; None without labels).
    """
    kept = [one for one in measured if one["verdict"] == "passed" and one["p50"] and one["p50"]["value"]]
    if not kept:
        return None, "no candidate keeps the contract"
    fastest = min(kept, key=_median)
    chosen = min((one for one in kept if not any(_beats(other, one) for other in kept)), key=_median)
    if len(kept) == 1:
        return chosen["label"], "the only candidate that keeps the contract"
    if chosen is not fastest:
        return chosen["label"], (
            f"every faster one, {fastest['label']} first, has a more accurate one beside it "
            "that is not significantly slower"
        )
    why = f"the fastest of {len(kept)} that keep the contract"
    if chosen["accuracy"] is not None:
        least = (max(map(_accuracy, kept)) - chosen["accuracy"]) / 2
        if least > 0:
            other = min((one for one in kept if _accuracy(one) - chosen["accuracy"] >= least), key=_median)
            gain, cost = _accuracy(other) - chosen["accuracy"], _median(other) / _median(chosen) - 1
            why += f"; {other['label']} is {100 * gain:.2f} points more accurate and {cost:.0%} slower"
    return chosen["label"], why


def _beats(other: Mapping[str, Any], one: Mapping[str, Any]) -> bool:
    """Whether another candidate is more accurate, and within the interval of this one's latency."""
    return _accuracy(other) > _accuracy(one) and _median(other) <= (one["p50"]["high"] or _median(one))


def _median(one: Mapping[str, Any]) -> float:
    median: float = one["p50"]["value"]
    return median


def _accuracy(one: Mapping[str, Any]) -> float:
    return 0.0 if one["accuracy"] is None else one["accuracy"]
