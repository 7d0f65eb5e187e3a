"""Entry point: one verb, one request, one result."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any

from . import activation, facts, releases, tuning, upkeep
from .protocol import Refusal, emit, receive


def _activate(request: dict[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(Refusal):  # a device that cannot be set back can still be rolled back
        tuning.recover(request["root"])
    return activation.activate(request)


def _build(request: dict[str, Any]) -> dict[str, Any]:
    from . import engine

    tuning.recover(request["root"])  # kernels are timed at the clocks that they will run at
    return engine.build(request)


def _bench(request: dict[str, Any]) -> dict[str, Any]:
    from . import measure

    return measure.bench(request)


def _health(request: dict[str, Any]) -> dict[str, Any]:
    from . import health

    return health.check(request)


def _probe(request: dict[str, Any]) -> dict[str, Any]:
    from . import health

    return health.probe(request)


VERBS = {
    "facts": facts.collect,
    "build": _build,
    "inventory": releases.inventory,
    "install": releases.install,
    "activate": _activate,
    "health": _health,
    "probe": _probe,
    "releases": upkeep.describe,
    "prune": upkeep.prune,
    "bench": _bench,
}


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End like on Ctrl-C when the host breaks off, so that what this process started ends too."""
    raise KeyboardInterrupt


def main(arguments: list[str]) -> int:
    """Run ``agent.pyz VERB`` with a request on standard input; 0 after a result, 1 after a refusal."""
    if len(arguments) != 1 or arguments[0] not in VERBS:
        print("usage: agent.pyz {}".format("|".join(VERBS)), file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        emit("result", value=VERBS[arguments[0]](receive()))
    except Refusal as refusal:
        emit("refusal", message=refusal.message, hint=refusal.hint)
        return 1
    except OSError as error:
        where = error.filename or os.getcwd()
        hint = "free space or change the permissions there"
        emit("refusal", message="{}: {}".format(error.strerror or error, where), hint=hint)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the host shows it as what it is: a bug, with its traceback
        traceback.print_exc()
        emit("failure", message="{}: {}".format(type(error).__name__, error))
        return 1
    return 0
