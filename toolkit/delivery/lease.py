"""The lease on a device: whoever changes it holds one, renews it, and gives it back."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from toolkit.console import Console
from toolkit.devices import Device
from toolkit.devices.agent import Agent
from toolkit.errors import StageError

log = logging.getLogger(__name__)

SECONDS, RENEWED_EVERY, LOOKED_EVERY = 60.0, 20.0, 5.0
_ANSWER_SECONDS = 20.0


@dataclass(frozen=True)
class Claim:
    """How a lease is asked for.

    Attributes:
        wait: Seconds to wait for whoever holds it.
        steal: Take it from whoever holds it.
    """

    wait: float = 0.0
    steal: bool = False


@contextlib.contextmanager
def held(device: Device, doing: str, claim: Claim = Claim(), console: Console | None = None) -> Iterator[None]:
    """Hold a device's lease; within another one that this process holds there, does nothing.

    Args:
        device: The machine, or a container on it.
        doing: What for, as ``toolkit rollback orin``; others are told.
        claim: What to do when somebody else holds it.
        console: Who is told of the waiting; nobody by default.

    Raises:
        StageError: Somebody else holds it.
    """
    from toolkit.devices.container import ContainerDevice

    # a container would be started for every renewal
    machine = device.inner if isinstance(device, ContainerDevice) else device
    if device.lease is not None:
        yield
        return
    agent, token = Agent(machine), secrets.token_hex(16)
    request = {
        "root": machine.root,
        "token": token,
        "holder": f"{me()} ({doing}, {os.getpid()})",
        "process": _process(os.getpid()),
        "seconds": SECONDS,
    }
    if not _take(agent, request, claim, console or Console(quiet=True)):
        log.warning("the disk of %s is too full for a lease: nothing keeps others off", machine.name)
        yield
        return
    device.lease = token
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(agent, request, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join(_ANSWER_SECONDS)
        device.lease = None
        try:
            agent.ask("return-lease", request, timeout=_ANSWER_SECONDS)
        except StageError as problem:
            log.info("the lease on %s was not given back, and expires: %s", machine.name, problem.message)


def me() -> str:
    """Return ``user@host``; the user is a number where it has no name, as in a container."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def holder(agent: Agent) -> str | None:
    """Return who is at work on a device, since when and until when; None for nobody."""
    found = agent.ask("show-lease", {"root": agent.device.root})["held"]
    return _words(found) if found else None


def _take(agent: Agent, request: dict[str, Any], claim: Claim, console: Console) -> bool:
    """Take the lease; return whether there was room for it."""
    name = agent.device.name
    answer = agent.ask("take-lease", request | {"steal": claim.steal})
    if not answer["taken"] and (died := _died(answer["held"]["process"])):
        log.info("whoever held %s has died on this machine", name)
        answer = agent.ask("take-lease", request | {"steal": False, "died": died})
    if not answer["taken"] and claim.wait:
        began = time.monotonic()
        with console.progress("lease") as progress:
            while not answer["taken"] and (waited := time.monotonic() - began) < claim.wait:
                progress(int(waited), int(claim.wait), f"seconds waited for {answer['held']['holder']}")
                time.sleep(min(LOOKED_EVERY, claim.wait - waited, answer["held"]["left"] + 0.1))
                answer = agent.ask("take-lease", request | {"steal": False})
    if not answer["taken"]:
        raise StageError(
            f"{name} is not free: {_words(answer['held'])}",
            f"wait {'longer' if claim.wait else 'for them'} (--wait 10m), or take the device from them (--steal)",
        )
    if answer["held"]:
        log.warning("%s was taken over from %s", name, _words(answer["held"]))
    return bool(answer["kept"])


def _process(pid: int) -> str | None:
    """Return what a process is called that no other is, also not after a reboot or in a container; None if dead."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state == "Z" else f"{boot} {Path('/proc/self/ns/pid').readlink()} {started} {pid}"


def _died(process: str) -> str | None:
    """Return a process that was one of this machine's and is not any more; None where that is not known."""
    boot, namespace, _, pid = process.split()
    mine = str(_process(os.getpid())).split()
    return process if [boot, namespace] == mine[:2] and _process(int(pid)) != process else None


def _renew(agent: Agent, request: dict[str, Any], ended: threading.Event) -> None:
    """Renew the lease until its end; it outlives a short loss of the connection, and others report a long one."""
    while not ended.wait(RENEWED_EVERY):
        try:
            if not agent.ask("renew-lease", request, timeout=_ANSWER_SECONDS)["mine"]:
                log.warning("somebody has taken %s over; this ends at its next step there", agent.device.name)
                return
        except StageError as problem:
            log.info("the lease on %s was not renewed: %s", agent.device.name, problem.message)


def _words(held: dict[str, Any]) -> str:
    """Say a lease in this machine's time, whatever the device's clock says."""
    since, until = (datetime.now() + timedelta(seconds=s) for s in (-held["age"], held["left"]))
    return f"{held['holder']} since {since:%H:%M:%S}, until {until:%H:%M:%S} if it is not renewed"
