"""What a connection runs over: a socket, or the streams of a command; it ends when the other side falls silent."""

from __future__ import annotations

import contextlib
import errno
import socket
import subprocess
import threading
import time
import weakref
from typing import Any

import paramiko

from toolkit.devices.ssh_address import Address

_INTERVAL, _TIMES = 15, 3  # without ServerAliveInterval and ServerAliveCountMax: a dead device is known after 45 s


class Line(socket.socket):
    """A socket that breaks off by itself when it has heard nothing for :attr:`limit` seconds.

    TCP alone goes on for a quarter of an hour when packets are lost silently, and never notices while it has
    nothing to send. Paramiko comes back to its socket ten times a second, so that no watcher is needed.
    """

    limit = float("inf")
    _heard = 0.0
    _proxy: weakref.finalize[..., Line] | None = None

    def recv(self, *arguments: Any) -> bytes:
        try:
            data = super().recv(*arguments)
        except TimeoutError:
            self._require_life()
            raise
        self._heard = time.monotonic()
        return data

    def send(self, *arguments: Any) -> int:
        try:
            return super().send(*arguments)
        except TimeoutError:
            self._require_life()
            raise

    def end_with(self, proxy: subprocess.Popen[bytes]) -> None:
        """End a command when this is closed, or with the program: it may wait for somebody who is gone."""
        self._proxy = weakref.finalize(self, proxy.terminate)

    def close(self) -> None:
        super().close()
        if self._proxy:
            self._proxy()

    def _require_life(self) -> None:
        if time.monotonic() - self._heard > self.limit:
            raise ConnectionAbortedError(errno.ECONNABORTED, f"no answer for {self.limit:g} s")


def dial(address: Address, timeout: float) -> Line:
    """Reach a host, or start the command that does.

    Args:
        address: The host.
        timeout: Seconds for it to answer.

    Raises:
        OSError: It cannot be reached.
    """
    if address.proxy is None:
        line = Line(fileno=socket.create_connection((address.hostname, address.port), timeout).detach())
    else:  # a socket, unlike a pipe, says at both ends when the other is gone
        ours, theirs = socket.socketpair()
        line = Line(fileno=ours.detach())
        command = ["sh", "-c", f"exec {address.proxy}"]
        with theirs:
            line.end_with(subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno()))
    line.settimeout(timeout)
    return line


def keep_alive(transport: paramiko.Transport, line: Line, address: Address) -> None:
    """Ask a host from time to time whether it is there, and let the connection end when it does not answer."""
    interval = address.seconds("serveraliveinterval", _INTERVAL)
    line.limit = interval * address.seconds("serveralivecountmax", _TIMES)

    def ask() -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            while transport.is_active():
                transport.global_request("keepalive@openssh.com", wait=True)  # answered by every server, with a no
                time.sleep(interval)

    threading.Thread(target=ask, daemon=True).start()
