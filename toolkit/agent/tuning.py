"""Power mode and clocks while something is measured, and as they were found whatever ends that.

ROOT/tuning.json, the journal, says what was found; it is on the disk before anything is changed. A guardian, a
process in a session of its own, holds it locked and waits for this one to end; then it sets everything back and
removes it. A journal that nobody holds is from before a power loss, or its guardian was killed too: :func:`recover`
does what it says.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from . import releases
from .knobs import KNOBS, Knob, chosen
from .programs import Root
from .protocol import Refusal

_JOURNAL = "tuning.json"
_GUARDIAN = (
    "import sys; sys.path.insert(0, sys.argv[1]); from {} import tuning; tuning.guard(*sys.argv[2:])".format(
        (__package__ or "").rpartition(".")[2]
    )
)


@contextlib.contextmanager
def applied(root: str, request: dict[str, Any]) -> Iterator[dict[str, dict[str, str]]]:
    """Set power mode and clocks for as long as the block lasts; whoever calls holds the device's lock.

    Args:
        root: Where releases live.
        request: ``power_mode`` (name or number, or None), ``clocks`` (``locked`` or None), ``sudo``.

    Yields:
        ``set`` and ``found``: what each knob is now, and was before, in words.

    Raises:
        Refusal: The device does not have it, or this user may not set it, and nothing is changed; or it stays what
            it was; or it could not be set back.
    """
    tools = Root(root, request["sudo"])
    knobs = chosen(tools, request["power_mode"], request["clocks"])
    wanted = {knob.name: words for knob in knobs if (words := knob.wanted)}
    asked = [knob for knob in knobs if knob.name in wanted]
    if all(knob.show(knob.read()) == wanted[knob.name] for knob in asked):
        yield {"set": wanted, "found": wanted}
        return
    found = [(knob, knob.read()) for knob in knobs]
    with _guarded(root, request["sudo"], {knob.name: state for knob, state in found}):
        try:
            _reset(found)
        except Refusal:  # there is no way back, so that nothing is changed
            os.unlink(os.path.join(root, _JOURNAL))
            raise
        for knob in asked:
            knob.write()
        for knob in asked:
            got = knob.show(knob.read())
            if got != wanted[knob.name]:
                raise Refusal(
                    "{} should be {} and stays {}".format(knob.name, wanted[knob.name], got),
                    "look for what else sets it on the device, or leave it out in the target file",
                )
        yield {"set": wanted, "found": {knob.name: knob.show(state) for knob, state in found if knob in asked}}


@contextlib.contextmanager
def _guarded(root: str, sudo: bool, found: dict[str, Any]) -> Iterator[None]:
    """Have a process stand by that sets back what was found, however this one ends."""
    path = os.path.join(root, _JOURNAL)
    with open(path + ".new", "w+", encoding="utf-8") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        json.dump({"boot": _boot(), "sudo": sudo, "found": found}, journal)
        journal.flush()
        os.fsync(journal.fileno())
        os.replace(path + ".new", path)
        releases.sync(root)
        code = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        guardian = subprocess.Popen(
            [sys.executable, "-c", _GUARDIAN, code, root, str(journal.fileno())],
            stdin=subprocess.PIPE,  # ends when this process does
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # sshd ends a session only when nobody has its streams any more
            pass_fds=[journal.fileno()],
            start_new_session=True,
        )
    with guardian:
        assert guardian.stdin
        assert guardian.stdout
        try:
            if guardian.stdout.readline() != b"ready\n":
                raise Refusal("no process could be started that would set the clocks back", "try again")
            yield
        finally:
            guardian.stdin.close()
            guardian.wait()
            recover(root)  # there is nothing to do, unless the guardian could not do it; then this says why


def guard(root: str, descriptor: str) -> None:
    """Wait for the process at the other end of standard input to end, then set back what the journal says."""
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    print("ready", flush=True)
    sys.stdin.read()
    with os.fdopen(int(descriptor), encoding="utf-8") as journal:
        _set_back(root, journal)


def recover(root: str) -> None:
    """Set back what a journal says that nobody holds; wait for one that somebody holds.

    Raises:
        Refusal: It cannot be set back; the journal stays, and the next one tries again.
    """
    try:
        journal = open(os.path.join(root, _JOURNAL), encoding="utf-8")  # noqa: SIM115
    except FileNotFoundError:
        return
    with journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        if os.fstat(journal.fileno()).st_nlink:  # otherwise its guardian has removed it meanwhile
            _set_back(root, journal)


def _set_back(root: str, journal: TextIO) -> None:
    journal.seek(0)
    entry = json.load(journal)
    tools = Root(root, entry["sudo"])
    try:
        knobs = [(KNOBS[name](tools), found) for name, found in entry["found"].items()]
        # clocks of before a reboot are gone by themselves
        knobs = [(knob, found) for knob, found in knobs if knob.lasting or entry["boot"] == _boot()]
        _reset(knobs)
    except Refusal as problem:
        path = os.path.join(root, _JOURNAL)
        raise Refusal(
            "the device is not set back to what it was before a benchmark: {}".format(problem.message),
            "{}; or set it by hand and remove {}".format(problem.hint, path),
        ) from problem
    os.unlink(os.path.join(root, _JOURNAL))
    releases.sync(root)


def _reset(knobs: list[tuple[Knob, Any]]) -> None:
    """Set knobs back, the last one first; one that refuses does not keep the others from it."""
    problems: list[Refusal] = []
    for order in (knobs[::-1], knobs):  # once more the other way round: a power mode brings clocks of its own
        attempts = [_refusal(knob.reset, found) for knob, found in order]
        attempts += [_refusal(_require, knob, found) for knob, found in order]
        problems = [problem for problem in attempts if problem is not None]
        if not problems:
            return
    raise problems[0]


def _refusal(action: Callable[..., None], *arguments: Any) -> Refusal | None:
    try:
        action(*arguments)
    except Refusal as refusal:
        return refusal
    return None


def _require(knob: Knob, found: Any) -> None:
    state = knob.read()
    if state != found:
        raise Refusal(
            "{} was {} and stays {}".format(knob.name, knob.show(found), knob.show(state)),
            "look for what else sets it on the device",
        )


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        return file.read().strip()
