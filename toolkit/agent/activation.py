"""The switch with its last check, in one request: it ends well or is undone, also when nobody listens any more."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from . import PROTOCOL, releases
from .protocol import Refusal

_SECONDS = 300.0  # a GPU's first load of an engine takes a minute on a slow device


def activate(request: dict[str, Any]) -> dict[str, Any]:
    """Make a release current and see that it runs; a switch to one that does not is undone.

    Args:
        request: ``root`` and ``id``.

    Returns:
        ``current`` and ``previous``, and ``problem``: None, or ``message`` and ``hint`` of why the release does
        not run; then both are what they were before.

    Raises:
        Refusal: The release is not here or not whole; or it does not run, and what was current is not whole.
    """
    was = releases.switch(request)["was"]
    try:
        problem = _check(request)
    except BaseException:
        releases.restore(dict(request, was=was))
        raise
    if problem is None:
        return dict(releases.confirm(request), problem=None)
    try:
        return dict(releases.restore(dict(request, was=was)), problem=problem)
    except Refusal as second:
        raise Refusal(
            "release {} does not run ({}) and is current nevertheless: {}".format(
                request["id"], problem["message"], second.message
            ),
            second.hint,
        ) from second


def _check(request: dict[str, Any]) -> dict[str, Any] | None:
    """Run the health check in a process of its own, so that a crash counts too; return what is wrong."""
    question = json.dumps({"root": request["root"], "id": request["id"], "protocol": PROTOCOL})
    hint = "look at the device's load and memory"
    try:
        done = subprocess.run(
            [sys.executable, sys.argv[0], "health"],
            input=question.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"message": "its health check did not end within {:g} s".format(_SECONDS), "hint": hint}
    said = done.stderr.decode("utf-8", "replace")
    sys.stderr.write(said)
    if done.returncode == 0:
        return None
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")]
    if events and events[-1]["event"] == "refusal":
        return {"message": events[-1]["message"], "hint": events[-1]["hint"]}
    reason = (said.strip().splitlines() or ["it said nothing"])[-1]
    return {"message": "exit {}: {}".format(done.returncode, reason), "hint": hint}
