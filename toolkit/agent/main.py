"""Entry point: one verb, one request, one result."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any

from . import activation, environments, facts, leases, releases, signatures, tuning, upkeep
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

    result = measure.bench(request)
    leases.require(request)  # whoever has taken the device over meanwhile has disturbed the measurement
    return result


def _compare(request: dict[str, Any]) -> dict[str, Any]:
    from . import compare

    result = compare.compare(request)
    leases.require(request)
    return result


def _health(request: dict[str, Any]) -> dict[str, Any]:
    from . import health

    return health.check(request)


def _probe(request: dict[str, Any]) -> dict[str, Any]:
    from . import health

    return health.probe(request)


def _predict(request: dict[str, Any]) -> dict[str, Any]:
    from . import predict

    return predict.compute(request)


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
    "provision": environments.provision,
    "bench": _bench,
    "compare": _compare,
    "signers": signatures.signers,
    "trust": signatures.trust,
    "take-lease": leases.take,
    "renew-lease": leases.renew,
    "return-lease": leases.give_back,
    "show-lease": leases.show,
    "manifest": releases.manifest,
    "predict": _predict,
}
# verbs for whoever holds the device's lease, or for anybody when nobody does
CHANGES = {"build", "install", "activate", "prune", "provision", "bench", "compare", "trust"}


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End like on Ctrl-C when the host breaks off, so that what this process started ends too."""
    raise KeyboardInterrupt


def _command(arguments: list[str]) -> int:
    """Run ``agent.pyz predict IMAGE...`` for a person; 2 after what is no image."""
    try:
        from . import predict

        return predict.command(arguments)
    except Refusal as refusal:
        problem = refusal
    except ImportError as error:
        problem = Refusal("this Python lacks what a release needs: {}".format(error), "toolkit provision TARGET")
    except KeyboardInterrupt:
        return 130
    print("error: {}\nhint: {}".format(problem, problem.hint or "give image files"), file=sys.stderr)
    return 2 if isinstance(problem, ValueError) else 1


def main(arguments: list[str]) -> int:
    """Run ``agent.pyz VERB`` with a request on standard input; 0 after a result, 1 after a refusal.

    ``agent.pyz predict IMAGE...`` takes its request from the command line.
    """
    if arguments[:1] == ["predict"] and len(arguments) > 1:
        return _command(arguments[1:])
    if len(arguments) != 1 or arguments[0] not in VERBS:
        print("usage: agent.pyz {}".format("|".join(VERBS)), file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        request = receive()
        if arguments[0] in CHANGES and not request.get("dry_run"):
            leases.require(request)
        emit("result", value=VERBS[arguments[0]](request))
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
        if isinstance(error, ModuleNotFoundError) and error.name == "numpy":
            message = "the Python on the device has no NumPy ({})".format(sys.executable)
            emit("refusal", message=message, hint="toolkit provision TARGET")
            return 1
        traceback.print_exc()
        emit("failure", message="{}: {}".format(type(error).__name__, error))
        return 1
    return 0
