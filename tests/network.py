"""Hosts with addresses of their own: network namespaces, and wires between them that can be cut and slowed."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest


def _ip(*arguments: str, namespace: str | None = None) -> str:
    inside = ["-n", namespace] if namespace else []
    return subprocess.run(["ip", *inside, *arguments], check=True, capture_output=True, text=True).stdout


class Wire:
    """Joins two namespaces (None is this machine's own); its near end is ``addresses[0]``, its far end ``[1]``."""

    def __init__(self, near: str | None, far: str) -> None:
        self.near, self.far = near, far
        for number in range(1 << 15):  # its name is what no other process takes meanwhile, and so its addresses
            self.name = f"toolkit{number}"
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("link", "add", self.name, "type", "veth", "peer", "name", "far", "netns", far)
                break
        else:
            raise AssertionError("no wire can be made")
        first = (198 << 24) + (18 << 16) + number * 4  # 198.18.0.0/15 is for tests of networks (RFC 2544)
        self.addresses = tuple(".".join(map(str, (first + end).to_bytes(4, "big"))) for end in (1, 2))
        if near:
            _ip("link", "set", self.name, "netns", near)
        for namespace, device, address in self._ends():
            _ip("address", "add", f"{address}/30", "dev", device, namespace=namespace)
            _ip("link", "set", device, "up", namespace=namespace)

    def _ends(self) -> list[tuple[str | None, str, str]]:
        return [(self.near, self.name, self.addresses[0]), (self.far, "far", self.addresses[1])]

    def cut(self) -> None:
        """What is sent from now on is lost, and nobody is told."""
        _ip("link", "set", "far", "down", namespace=self.far)

    def mend(self) -> None:
        """Bring it back, and wait until it carries."""
        _ip("link", "set", "far", "up", namespace=self.far)
        for _ in range(100):
            if all("state UP" in _ip("link", "show", end, namespace=inside) for inside, end, _ in self._ends()):
                return
            time.sleep(0.05)
        raise AssertionError("the wire does not come up")

    def slow(self, megabits: float) -> None:
        """Let no more than so many megabits through a second, either way."""
        for namespace, device, _ in self._ends():
            command = ["tc", *(["-n", namespace] if namespace else []), "qdisc", "replace", "dev", device, "root"]
            limit = ["tbf", "rate", f"{megabits}mbit", "burst", "128kb", "latency", "200ms"]
            subprocess.run([*command, *limit], check=True)


class Network:
    """Namespaces and wires, all gone after ``with``, and the processes in them too."""

    def __enter__(self) -> Network:
        self._namespaces: list[str] = []
        return self

    def namespace(self) -> str:
        """Make a namespace."""
        name = f"toolkit-{secrets.token_hex(4)}"
        _ip("netns", "add", name)
        self._namespaces.append(name)
        _ip("link", "set", "lo", "up", namespace=name)
        return name

    def host(self, behind: str | None = None) -> Wire:
        """Make a namespace on a wire to another one, or to this machine."""
        return Wire(behind, self.namespace())

    def __exit__(self, *_: object) -> None:
        for name in self._namespaces:
            for pid in processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], check=False)  # the wires go with their ends


def processes(namespace: str) -> list[int]:
    """The processes in a namespace."""
    return [int(pid) for pid in _ip("netns", "pids", namespace).split()]


@functools.cache
def _available() -> bool:
    try:
        with Network() as network:
            network.host()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@pytest.fixture
def network() -> Iterator[Network]:
    if not _available():
        pytest.skip("needs root, network namespaces with veth pairs, and ip (apt-get install iproute2)")
    with Network() as made:
        yield made
