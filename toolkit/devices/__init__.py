"""Devices behind one interface; the agent is what runs on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from toolkit.config import Target
from toolkit.process import Finished

if TYPE_CHECKING:
    from toolkit.devices.ssh import SshDevice


class Device(Protocol):
    """A machine that programs run on and files go to; paths are those of the device.

    ``lease`` is the token of the lease that this process holds there; see :mod:`toolkit.delivery.lease`.
    """

    name: str
    root: str
    lease: str | None

    @property
    def python(self) -> str:
        """The Python that the agent runs on."""

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

    def upload(self, source: Path | bytes, destination: str, offset: int, progress: Callable[[int], None]) -> None:
        """Copy a file or bytes there from byte ``offset`` on, making its folder; ``progress`` hears of each block.

        It is written in place, and what is there stays: it is the beginning to go on from when this breaks off.
        Two that copy the same content at once do not disturb each other, nor does one that comes late, out of a
        connection that was given up.
        """

    def get(self, source: str, destination: Path) -> None:
        """Copy a file from there."""

    def exists(self, path: str) -> bool:
        """Tell whether a file is there."""

    def remove(self, path: str) -> None:
        """Remove a file, or a folder and what is in it."""


def open_device(host: str | None, target: Target, build: Path, root: Path | None = None) -> Device:
    """Return a machine.

    Args:
        host: None or ``local`` for this machine; otherwise what ``ssh`` takes.
        target: Whose releases go there; its ``root`` is where.
        build: Folder of artifacts; without a ``root``, this machine keeps a target's releases below it.
        root: Folder on this machine instead of the target's.

    Raises:
        UsageError: The host is none.
        StageError: It cannot be reached.
    """
    if host not in (None, "local"):
        return _connected(host, target.root or "~/.toolkit", target.python, target.accept_new_host_key)
    if root is None:
        root = Path(target.root).expanduser() if target.root else build / "devices" / target.name
    return _here(root.absolute())


@functools.cache
def _here(root: Path) -> Device:
    """Return this machine, the same for everybody who asks: whoever holds its lease holds it for all of a run."""
    from toolkit.devices.local import LocalDevice

    return LocalDevice(root)


@functools.cache
def _connected(host: str, root: str, python: str, accept_new_host_key: bool) -> Device:
    """Return a machine over SSH, the same for everybody who asks, so that a run connects once."""
    from toolkit.devices.ssh import SshDevice

    device = SshDevice(host, root, python, accept_new_host_key)
    _reached.append(device)
    return device


_reached: list[SshDevice] = []


def break_off() -> None:
    """End what other threads are doing on machines over SSH: there it is ended too, here it is a StageError."""
    for device in _reached:
        device.break_off()
