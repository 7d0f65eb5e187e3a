"""Who is at work on the device: a lease, which its holder renews and which expires by itself.

ROOT/lease       holder, token, since and until by this device's clock, for people; what counts is `expires`, by
                 CLOCK_BOOTTIME within one boot, which nobody can set
ROOT/lease.log   who took it over from whom
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from .protocol import Refusal


def take(request: dict[str, Any]) -> dict[str, Any]:
    """Take the lease, if it is free or to be stolen.

    Args:
        request: ``root``, ``token`` (a secret of the holder's), ``holder`` (who, in words), ``process`` (who, for
            machines), ``seconds`` (how long it lasts), ``steal`` (whether it is taken from whoever holds it),
            ``died`` (a process that it is taken from in any case).

    Returns:
        ``taken``; ``held``: who holds it, or held it until now, as :func:`show` says it; ``kept``: False where the
        disk is too full for it, so that a prune can still make room.
    """
    root = request["root"]
    with _locked(root):
        there = _read(root)
        held = None if there is None or there["token"] == request["token"] else _shown(there)
        if held and not request["steal"] and held["process"] != request.get("died"):
            return {"taken": False, "held": held, "kept": False}
        if held:
            with open(os.path.join(root, "lease.log"), "a", encoding="utf-8") as file:
                file.write("{} {} took over from {}\n".format(_wall(0), request["holder"], held["holder"]))
        try:
            _write(root, request, _wall(0), _clock())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return {"taken": True, "held": held, "kept": False}
    return {"taken": True, "held": held, "kept": True}


def renew(request: dict[str, Any]) -> dict[str, Any]:
    """Renew the lease for ``seconds``; returns whether it is still ``mine``, ``token``'s."""
    root = request["root"]
    with _locked(root):
        there = _read(root)
        if there is None or there["token"] != request["token"]:
            return {"mine": False}
        _write(root, dict(there, seconds=request["seconds"]), there["since"], there["taken"])
    return {"mine": True}


def give_back(request: dict[str, Any]) -> dict[str, Any]:
    """End the lease, if it is still ``token``'s."""
    root = request["root"]
    with _locked(root):
        there = _read(root)
        if there is not None and there["token"] == request["token"]:
            os.unlink(os.path.join(root, "lease"))
    return {}


def show(request: dict[str, Any]) -> dict[str, Any]:
    """Return ``held``: None, or ``holder``, ``process``, and ``age`` and ``left`` in seconds."""
    there = _read(request["root"])
    return {"held": _shown(there) if there else None}


def require(request: dict[str, Any]) -> None:
    """Refuse a change of the device by whoever does not hold its lease.

    Args:
        request: ``root``, and ``lease``: the token of the lease that the host holds; None for none, which will do
            as long as nobody has one.
    """
    there = _read(request["root"])
    held = _shown(there) if there else None
    mine = request.get("lease")
    if mine is not None and (there is None or there["token"] != mine):
        who = there["holder"] if there else "somebody who has ended since"
        raise Refusal("{} has taken this device over".format(who), "the same command again, with --wait 10m")
    if mine is None and held:
        raise Refusal("{} is at work here".format(held["holder"]), "wait until it has ended")


@contextlib.contextmanager
def _locked(root: str) -> Iterator[None]:
    """Hold a lock for moments; the releases' own is held for as long as a benchmark takes."""
    os.makedirs(root, exist_ok=True)
    with open(os.path.join(root, "lease.lock"), "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(root: str) -> dict[str, Any] | None:
    """Return what the file says, expired or not; a loss of power may leave it empty."""
    try:
        with open(os.path.join(root, "lease"), encoding="utf-8") as file:
            return dict(json.load(file))
    except (FileNotFoundError, ValueError):
        return None


def _shown(lease: dict[str, Any]) -> dict[str, Any] | None:
    """Return what others may know of a lease; None when it has expired."""
    left = lease["expires"] - _clock()
    if lease["boot"] != _boot() or left <= 0:
        return None
    return {
        "holder": lease["holder"],
        "process": lease["process"],
        "age": _clock() - lease["taken"],
        "left": left,
    }


def _write(root: str, claim: dict[str, Any], since: str, taken: float) -> None:
    path = os.path.join(root, "lease")
    lease = {
        "holder": claim["holder"],
        "process": claim["process"],
        "token": claim["token"],
        "since": since,
        "until": _wall(claim["seconds"]),
        "boot": _boot(),
        "taken": taken,
        "expires": _clock() + claim["seconds"],
    }
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(lease, file)
    os.replace(path + ".new", path)


def _clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _wall(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() + seconds))
