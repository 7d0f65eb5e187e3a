"""Runs stages against the store and keeps account of them; or plans them, which changes nothing."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from toolkit import units
from toolkit.bench.contract import Verdict
from toolkit.console import Console, fresh, reused
from toolkit.delivery import lease
from toolkit.delivery.release import Commitment, Pushed
from toolkit.devices import Device
from toolkit.engines.places import Place
from toolkit.job import Job
from toolkit.report import terminal
from toolkit.store import Artifact, DamagedError, Progress, Store, Work

log = logging.getLogger(__name__)

Make = Callable[[Work], dict[str, Any]]
_COMMANDS = {"commit": "run", "report": "bench"}  # last stage: command, where they have different names
# raised when a stage makes something else of the same inputs
VERSIONS = {
    "data": 1,
    "check": 2,
    "teacher": 2,
    "train": 4,
    "prune": 3,
    "finetune": 4,
    "export": 2,
    "quantize": 5,
    "reference": 1,
    "build": 2,
    "bench": 3,
    "compare": 1,
    "report": 2,
}


class Reached(Exception):  # noqa: N818
    """The last stage that was asked for is done."""


@dataclass(frozen=True)
class Done:
    """What became of a stage."""

    name: str
    cached: bool
    seconds: float
    artifact: str | None
    text: str


@dataclass
class Runner:
    """Makes stages, or finds them made.

    Attributes:
        store: Where artifacts are.
        console: Who is told.
        until: The stage to end with.
        rerun: Stages to make anew; ``all`` for every one.
        fast: Whether this is a fast run.
        done: What became of each stage so far.
        artifacts: The artifacts so far, by stage.
        runtimes: The p50 of each runtime that was measured, as ``bench`` has it; the engine's is one of them.
        leases: Devices that are held until it is closed.
        draws: Whether the report's pictures are drawn; not for each host of a fleet.
    """

    store: Store
    console: Console
    until: str
    rerun: frozenset[str] = frozenset()
    fast: bool = False
    done: list[Done] = field(default_factory=list)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    runtimes: dict[str, dict[str, Any]] = field(default_factory=dict)
    leases: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    release: str | None = None
    pushed: Pushed | None = None
    verdict: Verdict | None = None
    regression: dict[str, Any] = field(default_factory=lambda: {"regression": None})
    commitment: Commitment | None = None
    draws: bool = True
    writes: ClassVar[bool] = True

    @property
    def kept(self) -> bool:
        """Whether nothing that was seen speaks against the release: contract, and health after the switch."""
        return (self.verdict is None or self.verdict.passed) and (
            self.commitment is None or self.commitment.healthy
        )

    def aside(self, console: Console | None = None) -> Runner:
        """Return a runner with an account of its own: for one host of a fleet, for an engine to compare with."""
        return Runner(self.store, console or self.console, self.until, self.rerun, self.fast, draws=False)

    def beside(self) -> Runner:
        """Return a runner with the same account, for another engine from the same graph; see :meth:`take`."""
        return replace(self, artifacts=dict(self.artifacts))

    def take(self, other: Runner) -> None:
        """Go on with the engine that another runner has made."""
        self.artifacts, self.release, self.pushed = other.artifacts, other.release, other.pushed

    def make(
        self,
        name: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        make: Make,
        amount: float | None = None,
        *,
        stale: Callable[[Artifact], bool] = lambda found: False,
    ) -> Artifact:
        """Return the stage's artifact, from the store or made now.

        Args:
            name: Stage name.
            config: All that the result depends on beside ``inputs``.
            inputs: Artifacts that it is made from.
            make: Makes it.
            amount: How much work it is; see :meth:`Store.produce`.
            stale: Whether one that is there has to be made anew nevertheless.
        """
        started = time.monotonic()
        with self.console.progress(name) as progress:
            artifact = self.store.produce(
                name,
                Store.key(name, VERSIONS[name], config, inputs),
                make,
                config=config,
                inputs=inputs,
                fast=self.fast,
                amount=amount,
                rerun=bool(self.rerun & {name, "all"}),
                stale=stale,
                progress=progress,
                warn=self.console.warn,
            )
        seconds = time.monotonic() - started
        how = reused(artifact.created, artifact.digest) if artifact.cached else fresh(seconds)
        self.artifacts[name] = artifact
        if not artifact.cached:
            for note in artifact.meta.get("notes", ()):
                self.console.warn(note)
        self._note(name, how, artifact.meta, cached=artifact.cached, seconds=seconds, artifact=artifact.digest)
        return artifact

    def skip(self, name: str, why: str) -> None:
        """Note that a stage has nothing to do."""
        self._note(name, why, {}, cached=True)

    def push(self, release: str, there: bool, push: Callable[[Progress], Pushed]) -> Pushed:
        """Bring a release to its device: not an artifact, since the device may lose it at any time."""
        started = time.monotonic()
        with self.console.progress("push") as progress:
            pushed = push(progress)
        for name in pushed.repaired:
            self.console.warn(f"the device's copy of {name} was damaged and has been replaced")
        self.release, self.pushed = release, pushed
        seconds = time.monotonic() - started
        how = fresh(seconds) if pushed.sent_bytes else "the device has all of it, verified there"
        sent = {"release": release, "sent": pushed.sent_bytes}
        self._note("push", how, sent, cached=not pushed.sent_bytes, seconds=seconds, artifact=release)
        return pushed

    def need(self, artifact: Artifact) -> Artifact:
        """Return an artifact that the next step looks into; a plan may end here."""
        return artifact

    def prepared(self, place: Place) -> Place:
        """Return a place to build at, with everything there that it takes."""
        with self.console.progress("image") as progress:
            place.prepare(lambda line: progress(0, 0, line[:120]))
        return place

    def hold(self, device: Device, job: Job) -> None:
        """Keep others from changing a device until :attr:`leases` is closed."""
        doing = f"toolkit {_COMMANDS.get(self.until, self.until)} {job.target.name}"
        self.leases.enter_context(lease.held(device, doing, job.claim, self.console))

    def judged(self, verdict: Verdict, regression: dict[str, Any]) -> None:
        """Keep the verdict, and what was found of the release beside the current one."""
        self.verdict, self.regression = verdict, regression

    def committed(self, commitment: Commitment) -> None:
        """Keep what became of the release."""
        self.commitment = commitment

    def _note(
        self,
        name: str,
        how: str,
        meta: Mapping[str, Any],
        *,
        cached: bool,
        seconds: float = 0.0,
        artifact: str | None = None,
    ) -> None:
        text = terminal.describe(name, meta)
        if not (cached and self.console.brief):
            self.console.stage(name, f"{how}{': ' if text else ''}{text}")
        self.done.append(Done(name, cached, round(seconds, 3), artifact, text or how))
        if name == self.until:
            raise Reached(name)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keep what libraries print off stdout, where a program may be reading; for the process, so from one thread."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.ExitStack() as stack:
        if not log.isEnabledFor(logging.DEBUG):
            stack.enter_context(_no_noise())
        yield
    for line in printed.getvalue().splitlines():
        log.debug("%s", line)


@contextlib.contextmanager
def _no_noise() -> Iterator[None]:
    """Silence libraries' warnings and progress bars; what matters is said by the stage itself."""
    os.environ["TQDM_DISABLE"] = "1"
    for name in ("torch.utils.cpp_extension", "torch.onnx", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Planner(Runner):
    """Goes through the stages without making any: what is there, what would be made, and how long that takes."""

    writes: ClassVar[bool] = False

    def make(
        self,
        name: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        make: Make,
        amount: float | None = None,
        *,
        stale: Callable[[Artifact], bool] = lambda found: False,
    ) -> Artifact:
        """Return the artifact that is there, or one that is pending."""
        found = None
        problem = ""
        if not any(artifact.is_pending for artifact in inputs.values()) and not self.rerun & {name, "all"}:
            try:
                found = self.store.lookup(name, Store.key(name, VERSIONS[name], config, inputs))
            except DamagedError as damage:
                problem = f"{damage}: "
        if found and stale(found):
            found = None
        if found:
            text = terminal.describe(name, found.meta)
            self.done.append(Done(name, True, 0.0, found.digest, f"{reused(found.created, found.digest)}: {text}"))
        else:
            seconds = self.estimate(name, config, amount)
            how = f"about {units.duration(seconds)}" if seconds is not None else "no earlier run to go by"
            self.done.append(Done(name, False, seconds or 0.0, None, f"{problem}would run ({how})"))
        if found:
            self.artifacts[name] = found
        if name == self.until:
            raise Reached(name)
        return found or Artifact.pending(name)

    def estimate(self, name: str, config: Mapping[str, Any], amount: float | None) -> float | None:
        """Return seconds by what the stage's artifacts took, by the median, of the same model if there are any.

        None where there is nothing to go by: no artifact that was made in one go and to its end, or an amount of
        work (0) that is not known yet.
        """
        same, all_models = [], []
        for _, record in self.store.records():
            in_one_go = (record["amount"] or amount is None) and not record["meta"].get("stopped")
            if record["stage"] == name and in_one_go:
                all_models.append(record["seconds"] / (record["amount"] or 1))
                if record["config"].get("model") == config.get("model"):
                    same.append(all_models[-1])
        rates = same or all_models
        return statistics.median(rates) * (1 if amount is None else amount) if rates and amount != 0 else None

    def skip(self, name: str, why: str) -> None:
        """Note that a stage has nothing to do."""
        self.done.append(Done(name, True, 0.0, None, why))

    def push(self, release: str, there: bool, push: Callable[[Progress], Pushed]) -> Pushed:
        """Say whether the release is on the device."""
        text = f"release {release} is on the device" if there else f"would send release {release}"
        self.done.append(Done("push", there, 0.0, release if there else None, text))
        return Pushed(0, None, None, [])

    def hold(self, device: Device, job: Job) -> None:
        """Leave the device to others: a plan changes nothing."""

    def need(self, artifact: Artifact) -> Artifact:
        """End the plan at what nobody can know before it is made."""
        if artifact.is_pending:
            raise Reached(artifact.stage)
        return artifact

    def prepared(self, place: Place) -> Place:
        """End the plan where the image is not there yet: only inside it is known what it would build."""
        if not place.ready:
            raise Reached("build")
        return place
