"""The host's end of the agent: packs it, brings it to the device, asks it, and hears what it answers."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit import agent
from toolkit.devices import Device
from toolkit.errors import StageError
from toolkit.process import Finished
from toolkit.store import Progress

log = logging.getLogger(__name__)

PACKAGE = "toolkit_agent"  # what programs on the device import
_MAIN = f"import sys\n\nfrom {PACKAGE}.main import main\n\nsys.exit(main(sys.argv[1:]))\n"


def pack() -> bytes:
    """Return the agent as a zipapp; equal sources give equal bytes."""
    buffer = io.BytesIO()
    files = sorted(Path(agent.__file__).parent.glob("*.py"))
    sources = {f"{PACKAGE}/{path.name}": path.read_bytes() for path in files}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {"__main__.py": _MAIN.encode(), **sources}.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return buffer.getvalue()


class Agent:
    """The agent on a device.

    Args:
        device: Where it runs.
        python: Python there that it runs on; the device's own by default.
    """

    def __init__(self, device: Device, python: str | None = None) -> None:
        self.device = device
        self._python = python

    @cached_property
    def place(self) -> str:
        """Path of the agent on the device, there or not."""
        return f"{self.device.root}/agents/{hashlib.sha256(pack()).hexdigest()[:16]}.pyz"

    def ask(
        self,
        verb: str,
        request: dict[str, Any],
        *,
        progress: Progress = lambda done, total, text: None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Ask the agent for something and return its result.

        Raises:
            StageError: It refuses (with its reason and remedy), or breaks off.
        """
        finished, answer = self._call(verb, request, progress, timeout)
        if answer is None and self.place in finished.stderr:  # it is not there, or not whole
            self.device.put(pack(), self.place)
            finished, answer = self._call(verb, request, progress, timeout)
        for line in finished.stderr.splitlines():
            log.info("%s: %s", self.device.name, line)
        if answer is None:
            answer = {"event": "nothing"}
        if answer["event"] == "result":
            return dict(answer["value"])
        if answer["event"] == "refusal":
            raise StageError(f"{self.device.name}: {answer['message']}", answer["hint"])
        reason = answer.get("message") or (finished.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise StageError(
            f"the agent on {self.device.name} broke off during '{verb}' (exit {finished.returncode}): {reason}",
            "run again with -v for its whole output",
        )

    def _call(
        self, verb: str, request: dict[str, Any], progress: Progress, timeout: float | None
    ) -> tuple[Finished, dict[str, Any] | None]:
        """Run the agent and return how it ended, with its last word that is no progress."""
        answers: list[dict[str, Any]] = []

        def hear(line: str) -> None:
            try:
                event = json.loads(line)
            except ValueError:
                return
            if event.get("event") == "progress":
                progress(event["done"], event["total"], event["text"])
            else:
                answers.append(event)

        finished = self.device.run(
            [self._python or self.device.python, self.place, verb],
            stdin=json.dumps(request | {"protocol": agent.PROTOCOL, "lease": self.device.lease}),
            on_line=hear,
            timeout=timeout,
        )
        return finished, answers[-1] if answers else None
