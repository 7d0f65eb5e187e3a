"""What the agent and its host say to each other: JSON lines with an event each."""

from __future__ import annotations

import json
import sys
from typing import Any

from . import PROTOCOL


class Refusal(Exception):  # noqa: N818
    """Something that the user can act on; reaches the host as a sentence and a remedy."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class OutOfMemory(Exception):  # noqa: N818
    """The builder ran out of memory: a smaller workspace may do."""


def emit(event: str, **fields: object) -> None:
    """Write one event as a line."""
    print(json.dumps(dict(fields, event=event, protocol=PROTOCOL)), flush=True)


def progress(done: int, total: int, text: str) -> None:
    """Tell how far the work is; ``total`` 0 means that nobody knows."""
    emit("progress", done=done, total=total, text=text)


def receive() -> dict[str, Any]:
    """Read the request from standard input."""
    try:
        request = json.load(sys.stdin)
    except ValueError as error:
        raise Refusal("the request is not JSON: {}".format(error)) from error
    if request.get("protocol") != PROTOCOL:
        raise Refusal(
            "the host speaks protocol {} and this agent {}".format(request.get("protocol"), PROTOCOL),
            "push again, so that both are of one version",
        )
    return dict(request)
