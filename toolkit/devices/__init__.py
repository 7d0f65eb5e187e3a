"""Devices behind one interface; the agent is what runs on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from toolkit.config import Target
from toolkit.errors import StageError
from toolkit.process import Finished


class Device(Protocol):
    """A machine that programs run on and files go to; paths are those of the device."""

    name: str
    python: str
    root: str

    def facts(self) -> dict[str, Any]:
        """Return what the device is; see the agent's ``facts.collect``."""

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str = "",
        on_line: Callable[[str], None] = ...,
        timeout: float | None = None,
    ) -> Finished:
        """Run a program there; each line of its stdout goes to ``on_line``."""

    def put(self, source: Path | bytes, destination: str) -> None:
        """Copy a file (or bytes) there, making its folder; the destination is whole or absent."""

    def get(self, source: str, destination: Path) -> None:
        """Copy a file from there."""

    def exists(self, path: str) -> bool:
        """Tell whether a file is there."""

    def remove(self, path: str) -> None:
        """Remove a folder and what is in it."""


def open_device(host: str | None, target: Target, build: Path, root: Path | None = None) -> Device:
    """Return a machine.

    Args:
        host: None or ``local`` for this machine.
        target: Whose releases go there; its ``root`` is where.
        build: Folder of artifacts; without a ``root``, this machine keeps a target's releases below it.
        root: Folder on the machine instead of the target's.

    Raises:
        StageError: It is another host, which this version cannot reach.
    """
    from toolkit.devices.local import LocalDevice

    if host not in (None, "local"):
        raise StageError(
            f"'{host}' is reached over SSH, which this version does not do",
            "run the toolkit on that machine, without --host",
        )
    if root is None:
        root = Path(target.root).expanduser() if target.root else build / "devices" / target.name
    return LocalDevice(root.absolute())
