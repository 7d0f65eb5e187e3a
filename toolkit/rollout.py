"""The flow for a fleet: everything up to the graph once, the rest a host, wave after wave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from toolkit import networks, pipeline
from toolkit.board import Board, HostConsole
from toolkit.delivery import fleet, upkeep
from toolkit.delivery.release import Commitment
from toolkit.devices.agent import Agent
from toolkit.errors import StageError, ToolkitError, UsageError
from toolkit.job import Job
from toolkit.networks import Networks
from toolkit.stages import Reached, Runner

Status = Literal["committed", "done", "not committed", "failed", "rolled back", "not reached"]


@dataclass
class Host:
    """A host of a fleet.

    Attributes:
        name: As ``ssh`` takes it.
        wave: The wave that it belongs to, from 1.
        console: Shows its progress.
        stages: What became of its stages.
        status: What became of it; ``done`` when a stage before the commit was asked for.
        error: What ended its work, if something did.
    """

    name: str
    wave: int
    console: HostConsole
    stages: Runner
    status: Status = "not reached"
    error: ToolkitError | None = None

    @property
    def good(self) -> bool:
        """Whether it came through: to a kept contract, or to the stage that was asked for."""
        return self.error is None and self.status not in ("not reached", "rolled back") and self.stages.kept

    @property
    def current(self) -> str | None:
        """The release that it runs, as far as that is known: not after an error in the midst of a switch."""
        if self.error is not None and self.stages.verdict is not None:
            return None
        known = self.stages.commitment or self.stages.pushed
        return known.current if known else None

    @property
    def reason(self) -> str:
        """Why its status is what it is."""
        if self.error is not None:
            return self.error.message
        if self.stages.commitment is not None:
            return self.stages.commitment.reason
        return self.stages.done[-1].text if self.stages.done else "the rollout ended before"


@dataclass
class Rollout:
    """A job for all hosts of its target.

    Attributes:
        job: What to do.
        stages: Runs what is done once; every host has a runner of its own.
        hosts: The hosts.
        parallel: How many are at work at a time.
        guarded: Whether a wave has to be committed before the next begins, and is rolled back when it is not.
        board: Shows their progress.
    """

    job: Job
    stages: Runner
    hosts: list[Host]
    parallel: int
    guarded: bool
    board: Board

    @classmethod
    def of(cls, job: Job, stages: Runner, parallel: int, waves: str | None) -> Rollout:
        """Lay out a rollout; raises UsageError when it cannot be done in these waves."""
        names = job.target.fleet
        if waves is not None and not names:
            raise UsageError("--waves cuts a fleet, and one device is meant", "give --hosts or --group with it")
        if waves is not None and job.fast and not job.allow_fast:
            raise UsageError(
                "each wave has to be committed, and a fast run is not", "add --allow-fast, or leave out --fast"
            )
        board = Board(stages.console, names)
        cut = [names] if waves is None else fleet.waves(waves, names)
        hosts = [
            Host(name, number, console := HostConsole(board, name), stages.aside(console))
            for number, wave in enumerate(cut, 1)
            for name in wave
        ]
        return cls(job, stages, hosts, parallel, waves is not None, board)

    def run(self) -> None:
        """Do what is done once, then the hosts; each host keeps its own error.

        Raises:
            Reached: The last stage that was asked for is one of those that are done once.
            InterruptionError: Ctrl-C; the hosts say how far they are.
            ToolkitError: What is done once could not be done.
        """
        with self.board.shown():
            self._each(self.hosts, lambda host: pipeline.foresee(self.job.at(host.name), host.stages))
        try:
            made = networks.compress(self.job, self.stages)
        except Reached:
            self.hosts.clear()  # nothing was asked for that is done on a host
            raise
        stop = threading.Event()

        def deliver(host: Host) -> None:
            self._deliver(host, made)
            if self.guarded and host.status != "committed":
                stop.set()

        with self.board.shown():
            for number in range(1, self.hosts[-1].wave + 1):
                wave = [host for host in self.hosts if host.wave == number]
                self._each(wave, deliver, stop)
                if stop.is_set():
                    self._each([host for host in wave if host.status == "committed"], self._roll_back)
                    return

    def _each(
        self, hosts: Sequence[Host], work: Callable[[Host], None], stop: threading.Event | None = None
    ) -> None:
        by_name = {host.name: host for host in hosts}
        fleet.each(list(by_name), lambda name: work(by_name[name]), self.parallel, stop)

    def _deliver(self, host: Host, made: Networks) -> None:
        host.status = "failed"
        try:
            with host.stages.leases:
                pipeline.deliver(self.job.at(host.name), host.stages, made)
        except Reached:
            host.status = "done"
        except ToolkitError as error:
            host.error = error
        else:
            assert host.stages.commitment
            host.status = "committed" if host.stages.commitment.committed else "not committed"
        host.console.ended(f"{host.status}: {host.reason}")

    def _roll_back(self, host: Host) -> None:
        """Go back to what was current when this rollout came to the host."""
        commitment, pushed = host.stages.commitment, host.stages.pushed
        assert commitment
        assert pushed
        if pushed.current == commitment.current:
            return
        if pushed.current is None:
            reason = "its wave failed, and there is no previous release to go back to"
            host.stages.commitment = replace(commitment, reason=reason)
        else:
            try:
                job = self.job.at(host.name)
                device = pipeline.destination(job).device
                with host.stages.leases:
                    host.stages.hold(device, job)
                    now = upkeep.activate(pushed.current, Agent(device))
            except ToolkitError as error:
                host.status = "failed"
                host.error = StageError(f"its wave failed, and there is no way back: {error.message}", error.hint)
            else:
                host.status = "rolled back"
                reason = f"its wave failed; back to release {pushed.current}"
                host.stages.commitment = Commitment(False, reason, now["current"], now["previous"])
        host.console.ended(f"{host.status}: {host.reason}")
