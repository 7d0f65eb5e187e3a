"""Deliveries over links that break, onto disks that are full, beside others: a real sshd in a network namespace."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import Delivery, Watcher, compose, disturb, load, problem
from tests.network import Network, Wire, network
from tests.sshd import Server, needs_sshd
from toolkit import doctor
from toolkit.delivery import upkeep
from toolkit.delivery.release import push
from toolkit.devices.agent import Agent
from toolkit.devices.ssh import SshDevice
from toolkit.errors import StageError
from toolkit.files import load_target

__all__ = ["network"]
pytestmark = needs_sshd

PATIENCE = {"ServerAliveInterval": "1", "ServerAliveCountMax": "2", "ConnectTimeout": "3"}
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


@pytest.fixture
def wire(network: Network) -> Wire:
    return network.host()


@pytest.fixture
def server(wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The device ``orin``, its sshd not started yet."""
    made = Server(tmp_path / "server", address=wire.addresses[1], namespace=wire.far)
    made.configure(**PATIENCE)
    monkeypatch.setenv("TOOLKIT_SSH_CONFIG", str(made.config))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    yield made
    made.stop()


@pytest.fixture
def root(server: Server) -> Path:
    """Where the device keeps its releases."""
    return server.home("orin") / ".toolkit"


@pytest.fixture
def one(tmp_path: Path) -> Path:
    compose(tmp_path / "one", 1, size=2_000_000)
    return tmp_path / "one"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    compose(tmp_path / "two", 2, size=2_000_000)
    return tmp_path / "two"


@pytest.fixture
def small_disk(root: Path) -> Iterator[Path]:
    """The device's root as a file system of 4 MB."""
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(root)], check=True)
    yield root
    subprocess.run(["umount", "--lazy", str(root)], check=True)


def identity(folder: Path) -> str:
    return re.findall(r'"id": "(\w+)"', (folder / "manifest").read_text())[0]


def current(root: Path) -> str:
    """The current release's id; it is whole."""
    release = (root / "current").resolve(strict=True)
    assert problem(release) is None
    return release.name


def sent(root: Path) -> int:
    """How many bytes lie where what is sent arrives."""
    incoming = root / "incoming"
    return sum(path.stat().st_size for path in incoming.iterdir()) if incoming.exists() else 0


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_link_that_is_cut_in_mid_transfer(server: Server, wire: Wire, root: Path, one: Path, two: Path) -> None:
    server.start()
    assert Delivery("orin", one).end() == (0, "")
    wire.slow(8)
    with Watcher(root) as watcher:
        delivery = Delivery("orin", two)
        until(lambda: sent(root) > 500_000)
        wire.cut()
        status, errors = delivery.end()
        assert status == 1
        assert "the connection to 'orin' broke off during the copying of" in errors
        assert "hint: the same command continues where it stopped" in errors
        status, errors = Delivery("orin", two).end()
        assert status == 1
        assert "cannot be reached" in errors
        there = sent(root)
        wire.mend()
        again = Delivery("orin", two)
        assert again.end() == (0, "")
    assert 0 < again.sent <= 2_000_000 + 10_000 - there, "what had arrived was sent again"
    assert watcher.broken == []
    assert current(root) == identity(two)


def test_a_short_cut_is_not_noticed(server: Server, wire: Wire, root: Path, one: Path) -> None:
    server.configure()
    server.start()
    wire.slow(8)
    delivery = Delivery("orin", one)
    until(lambda: sent(root) > 500_000)
    wire.cut()
    time.sleep(1)
    wire.mend()
    assert delivery.end() == (0, "")
    assert current(root) == identity(one)


def test_a_dead_device_is_known_while_nothing_is_sent(server: Server, wire: Wire) -> None:
    server.start()
    device = SshDevice("orin", "~/.toolkit", sys.executable)
    with pytest.raises(StageError, match="the connection to 'orin' broke off during sh: "):
        device.run(["sh", "-c", "echo; exec sleep 600"], on_line=lambda line: wire.cut(), timeout=120)
    wire.mend()
    assert device.run(["true"]).returncode == 0


def test_a_killed_program_is_not_a_lost_connection(server: Server) -> None:
    accounts = server.folder / "passwd"
    accounts.write_text(accounts.read_text().replace(":/bin/sh", ":/bin/bash"))  # which stands aside for it
    server.start()
    device = SshDevice("orin", "~/.toolkit", sys.executable)
    assert device.run(["sh", "-c", "kill -9 $$"]).returncode == -1


def test_what_an_abandoned_connection_delivers_late_does_no_harm(
    server: Server, wire: Wire, root: Path, one: Path
) -> None:
    """A session stands still with data in its buffers, another completes the release, and the first goes on."""
    server.start()
    wire.slow(8)
    first = Delivery("orin", one)
    until(lambda: sent(root) > 500_000)
    (session,) = server.sessions()
    os.kill(session, signal.SIGSTOP)
    time.sleep(0.5)
    first.process.kill()
    first.end()
    again = Delivery("orin", one)
    assert again.end() == (0, "")
    with Watcher(root) as watcher:
        os.kill(session, signal.SIGCONT)
        until(lambda: session not in server.sessions())
    assert watcher.broken == []
    assert current(root) == identity(one)


def test_two_users_at_once(server: Server, wire: Wire, root: Path, one: Path, two: Path) -> None:
    server.start()
    wire.slow(16)
    with Watcher(root) as watcher:
        both = [Delivery("orin", folder) for folder in (one, two)]
        assert [delivery.end() for delivery in both] == [(0, ""), (0, "")]
    assert watcher.broken == []
    names = {current(root), (root / "previous").resolve(strict=True).name}
    assert names == {identity(one), identity(two)}
    assert [found for found in map(problem, (root / "releases").iterdir()) if found] == []


def test_one_release_from_two_users_at_once(server: Server, wire: Wire, root: Path, one: Path) -> None:
    server.start()
    wire.slow(16)
    both = [Delivery("orin", one) for _ in range(2)]
    assert [delivery.end() for delivery in both] == [(0, ""), (0, "")]
    assert current(root) == identity(one)


def test_a_disk_that_is_too_small(small_disk: Path, server: Server, one: Path, tmp_path: Path) -> None:
    server.start()
    assert Delivery("orin", one).end() == (0, "")
    compose(tmp_path / "large", 3, size=3_000_000)
    status, errors = Delivery("orin", tmp_path / "large").end()
    assert status == 1
    assert "bytes free and the release needs 3,0" in errors
    assert sent(small_disk) == 0, "it is known before the first byte"
    assert current(small_disk) == identity(one)


def test_a_disk_that_fills_up_meanwhile(
    small_disk: Path, server: Server, wire: Wire, one: Path, tmp_path: Path
) -> None:
    server.start()
    assert Delivery("orin", one).end() == (0, "")
    wire.slow(4)
    compose(tmp_path / "next", 3, size=1_500_000)
    with Watcher(small_disk) as watcher:
        delivery = Delivery("orin", tmp_path / "next")
        until(lambda: sent(small_disk) > 300_000)
        subprocess.run(["dd", "if=/dev/zero", f"of={small_disk}/somebody's"], stderr=subprocess.DEVNULL)
        status, errors = delivery.end()
        assert status == 1
        assert "there is no room left for" in errors
        assert "hint: free space there" in errors
        (small_disk / "somebody's").unlink()
        again = Delivery("orin", tmp_path / "next")
        assert again.end() == (0, "")
    assert again.sent < 1_300_000, "what had arrived was sent again"
    assert watcher.broken == []
    assert current(small_disk) == identity(tmp_path / "next")


@pytest.mark.parametrize("first", [True, False])
def test_a_read_only_disk(small_disk: Path, server: Server, one: Path, first: bool) -> None:
    server.start()
    if not first:
        assert Delivery("orin", one).end() == (0, "")
        (small_disk / "current" / "ballast").write_bytes(b"damaged")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    status, errors = Delivery("orin", one).end()
    assert status == 1
    assert f"no permission for {small_disk}/" in errors
    assert "root in the target file" in errors
    _, checks = doctor.examine_device(SshDevice("orin", "~/.toolkit", sys.executable), load_target("host-cpu"))
    assert [(check.name, check.status) for check in checks if check.name == "root"] == [("root", "fail")]
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert Delivery("orin", one).end() == (0, "")
    assert current(small_disk) == identity(one)


def under_way(host: str, folder: Path, root: Path) -> Delivery:
    """Return a delivery in mid transfer; the link may still be busy with what comes late, so that others fail."""
    for _ in range(5):
        delivery = Delivery(host, folder)
        reached = sent(root) + 300_000
        until(lambda: sent(root) > reached or delivery.process.poll() is not None)  # noqa: B023
        if delivery.process.poll() is None:
            return delivery
    raise AssertionError("no delivery comes through")


def answers(server: Server) -> bool:
    """Whether this machine reaches a server; some networks have a gateway that takes any connection."""
    try:
        with socket.create_connection((server.address, server.port), timeout=1) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def test_a_device_behind_another(network: Network, server: Server, wire: Wire, tmp_path: Path) -> None:
    """Only the first one can reach it, and whatever breaks on the way is noticed."""
    one = tmp_path / "one"
    compose(one, 1, size=8_000_000)  # the one in between delivers some megabytes late
    server.start()
    far = network.host(behind=wire.far)
    inner = Server(tmp_path / "inner", ["inner"], address=far.addresses[1], namespace=far.far)
    inner.configure(**PATIENCE, ProxyJump="orin")
    server.config.write_text(f"Include {server.folder}/hosts\nInclude {inner.folder}/hosts\n")
    inner.start()
    root = inner.home("inner") / ".toolkit"
    try:
        assert not answers(inner)
        far.slow(8)
        for breaks in (far, wire):
            delivery = under_way("inner", one, root)
            breaks.cut()
            status, errors = delivery.end()
            assert status == 1
            assert re.search(r"the connection to 'inner' broke off|'inner' .* cannot be reached", errors), errors
            breaks.mend()
        for _ in range(5):  # the link may still be busy with what comes late
            kept = sent(root)
            delivery = Delivery("inner", one)
            if delivery.end() == (0, ""):
                break
        assert kept > 500_000, "each break waits for 300 kB"
        assert delivery.sent <= sum(entry["bytes"] for entry in load(one).manifest["files"].values()) - kept
        assert current(root) == identity(one)
        device = SshDevice("inner", "~/.toolkit", sys.executable)
        server.stop()
        with pytest.raises(StageError, match=r"broke off during true|cannot be reached"):
            device.run(["true"])
    finally:
        inner.stop()


@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime (apt-get install libfaketime)")
@pytest.mark.parametrize(("shift", "told"), [("+1h", "ahead"), ("-1h", "behind")])
def test_a_clock_an_hour_off(server: Server, root: Path, one: Path, two: Path, shift: str, told: str) -> None:
    """What runs on the device sees the wrong time, its files' times included."""
    with (server.folder / "sshd_config").open("a") as file:
        file.write(f"SetEnv LD_PRELOAD={FAKETIME} FAKETIME={shift} DONT_FAKE_MONOTONIC=1\n")
    server.start()
    device = SshDevice("orin", "~/.toolkit", sys.executable)
    found, checks = doctor.examine_device(device, load_target("host-cpu"))
    assert found is not None
    assert found.skew is not None
    assert abs(found.skew) == pytest.approx(3600, abs=60)
    (clock,) = [check for check in checks if check.name == "clock"]
    assert clock.status == "warn"
    assert told in clock.text
    agent = Agent(device)
    for folder in (one, two):  # no switch: under libfaketime the time limit of its check does not work
        release = load(folder)
        assert push(release, agent).current is None
        assert problem(root / "releases" / release.id) is None
    assert upkeep.prune(agent, 1).releases == [load(one).id]


def test_random_faults(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small version of benchmarks/delivery_faults.py."""
    monkeypatch.setenv("TOOLKIT_SSH_CONFIG", "")
    tally = disturb(network, tmp_path, devices=3, count=9, seed=4)
    assert tally.wrong == []
    assert sum(tally.faults.values()) >= 9
    assert tally.ended["completed"] > 0
    assert tally.looks > 0
