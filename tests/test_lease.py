"""The lease on a device: real processes at once, killed ones, stolen ones; its clock is the device's own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Toolkit
from tests.sshd import Server, needs_sshd
from tests.test_releases import small
from toolkit import devices
from toolkit.agent import leases, main, measure
from toolkit.agent.protocol import Refusal
from toolkit.delivery import lease, upkeep
from toolkit.delivery import release as delivery
from toolkit.delivery.lease import Claim
from toolkit.devices.agent import Agent
from toolkit.devices.local import LocalDevice
from toolkit.devices.ssh import SshDevice
from toolkit.errors import StageError

HOLDS = """
import sys
from pathlib import Path
from toolkit.delivery import lease, upkeep
from toolkit.devices.agent import Agent
from toolkit.devices.local import LocalDevice
from toolkit.errors import StageError
lease.SECONDS = float(sys.argv[2])
device = LocalDevice(Path(sys.argv[1]))
try:
    with lease.held(device, "toolkit run first"):
        print("held", flush=True)
        sys.stdin.read(1)
        upkeep.prune(Agent(device), 0)
except StageError as error:
    sys.exit(error.message)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def root(job: Path) -> Path:
    return job / "build" / "devices" / "tiny"


@pytest.fixture
def hold(root: Path) -> Iterator[Start]:
    """Start another process that holds the device until it is told to prune it and end."""
    started = []

    def start(seconds: float = 60.0) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(root), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


PRUNE = ("releases", "prune", "tiny", "--keep", "0")


def test_a_second_user_is_told_who_and_what_to_do(toolkit: Toolkit, hold: Start, root: Path) -> None:
    first = hold()
    refused = toolkit(*PRUNE)
    assert refused.returncode == 1
    assert f"(toolkit run first, {first.pid}) since " in refused.stderr
    assert "hint: wait for them (--wait 10m), or take the device from them (--steal)" in refused.stderr
    for reading in ((*PRUNE, "--dry-run"), ("releases", "tiny")):
        assert toolkit(*reading).returncode == 0
    assert f"toolkit run first, {first.pid}" in toolkit("releases", "tiny").stdout
    assert f"toolkit run first, {first.pid}" in json.loads(toolkit("releases", "tiny", "--json").stdout)["holder"]
    examined = [line for line in toolkit("doctor", "tiny").stdout.splitlines() if " lease " in line]
    assert len(examined) == 1
    assert f"toolkit run first, {first.pid}) since 20" in examined[0]
    told = first.communicate("x")
    assert first.returncode == 0, told
    assert not (root / "lease").exists()
    assert " lease " not in toolkit("doctor", "tiny").stdout
    assert toolkit(*PRUNE).returncode == 0


def test_a_run_does_not_begin_to_change_what_others_work_on(toolkit: Toolkit, hold: Start, root: Path) -> None:
    from tests.test_adopt import network

    first = hold()
    network(root.parents[2] / "net.onnx")
    arguments = ("--model", "onnx:net.onnx", "--data", "none", "--mean", "0.5", "--std", "0.25")
    refused = toolkit("run", "tiny", *arguments)
    assert refused.returncode == 1
    assert f"error: this machine is not free: {lease.me()} (toolkit run first, {first.pid}) since" in refused.stderr
    assert sorted(path.name for path in root.iterdir()) == ["agents", "lease", "lease.lock"]
    assert toolkit("plan", "tiny", *arguments).returncode == 0
    first.communicate("x")
    result = toolkit("run", "tiny", *arguments)
    assert "release   " in result.stdout, result.stderr
    assert not (root / "lease").exists()


def test_waiting_ends_when_the_first_does(hold: Start, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LOOKED_EVERY", 0.1)
    first = hold()
    entered = threading.Event()

    def second() -> None:
        with lease.held(LocalDevice(root), "toolkit run second", Claim(wait=60.0)):
            entered.set()

    waiting = threading.Thread(target=second)
    waiting.start()
    assert not entered.wait(1.0)
    first.communicate("x")
    waiting.join(60)
    assert entered.is_set()
    hold()
    with pytest.raises(StageError, match="is not free"), lease.held(LocalDevice(root), "third", Claim(wait=0.3)):
        pass


def test_the_lease_of_who_was_killed_expires(hold: Start, root: Path, toolkit: Toolkit) -> None:
    first = hold(seconds=4.0)
    first.kill()
    first.wait()
    lease = json.loads((root / "lease").read_text())
    (root / "lease").write_text(json.dumps(lease | {"process": "of another machine 1"}))
    refused = toolkit(*PRUNE)
    assert refused.returncode == 1, "nobody here knows that it was killed"
    assert toolkit(*PRUNE, "--wait", "1m").returncode == 0


def test_who_was_killed_on_this_machine_is_in_nobodys_way(hold: Start, root: Path, toolkit: Toolkit) -> None:
    first = hold()
    first.kill()  # nobody has heard of it yet: it is a zombie
    assert toolkit(*PRUNE).returncode == 0
    assert not (root / "lease").exists()


def test_ctrl_c_gives_it_back(hold: Start, root: Path) -> None:
    first = hold()
    first.send_signal(signal.SIGINT)
    first.wait()
    assert not (root / "lease").exists()


def test_who_was_stolen_from_ends_at_the_next_step(toolkit: Toolkit, hold: Start, root: Path) -> None:
    first = hold()
    thief = toolkit(*PRUNE, "--steal")
    assert thief.returncode == 0, thief.stderr
    assert f"this machine was taken over from {lease.me()} (toolkit run first, {first.pid}) since" in thief.stderr
    (line,) = (root / "lease.log").read_text().splitlines()
    assert line.endswith(f"took over from {lease.me()} (toolkit run first, {first.pid})")
    assert f"{lease.me()} (toolkit releases prune tiny, " in line
    _, error = first.communicate("x")
    assert first.returncode == 1
    assert error == "this machine: somebody who has ended since has taken this device over\n"


def test_a_thief_at_work_is_named_and_his_lease_is_left_alone(hold: Start, root: Path) -> None:
    first = hold()
    thief = LocalDevice(root)
    with lease.held(thief, "theft", Claim(steal=True)):
        _, error = first.communicate("x")
        assert error == f"this machine: {lease.me()} (theft, {os.getpid()}) has taken this device over\n"
        upkeep.prune(Agent(thief), 0)
    assert not (root / "lease").exists()


def test_who_holds_no_lease_changes_nothing_meanwhile(hold: Start, root: Path, tmp_path: Path) -> None:
    agent = Agent(LocalDevice(root))
    delivery.push(small(tmp_path, "a"), agent)
    hold()
    with pytest.raises(StageError, match=r"toolkit run first, \d+\) is at work here"):
        delivery.push(small(tmp_path, "b"), agent)
    assert len(upkeep.listed(agent)) == 1


def test_a_measurement_that_somebody_disturbed_does_not_count(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = {"root": str(root), "token": "mine", "holder": "me", "process": "1", "seconds": 60, "steal": False}
    leases.take(claim)

    def disturbed(request: dict[str, Any]) -> dict[str, Any]:
        leases.take(claim | {"token": "yours", "holder": "you", "steal": True})
        return {}

    monkeypatch.setattr(measure, "bench", disturbed)
    with pytest.raises(Refusal, match="you has taken this device over"):
        main.VERBS["bench"]({"root": str(root), "lease": "mine"})


def test_what_counts_is_the_clock_that_nobody_sets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"root": str(root), "token": "1", "holder": "first", "process": "1", "seconds": 60, "steal": False}
    second = first | {"token": "2", "holder": "second"}
    now, boot, wall = leases._clock(), leases._boot(), time.time()
    assert leases.take(first) == {"taken": True, "held": None, "kept": True}
    for jump in (3600.0, -3600.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: wall + jump)
        assert not leases.take(second)["taken"]
    monkeypatch.setattr(leases, "_clock", lambda: now + 50)
    assert leases.take(second)["held"] == {
        "holder": "first",
        "process": "1",
        "age": pytest.approx(50, abs=1),
        "left": pytest.approx(10, abs=1),
    }
    assert leases.renew(first) == {"mine": True}
    monkeypatch.setattr(leases, "_clock", lambda: now + 100)
    assert leases.show(first)["held"]["left"] == pytest.approx(10)
    assert leases.show(first)["held"]["age"] == pytest.approx(100, abs=1)
    monkeypatch.setattr(leases, "_clock", lambda: now + 111)
    assert leases.show(first) == {"held": None}
    assert leases.renew(first) == {"mine": True}, "nobody has come since"
    monkeypatch.setattr(leases, "_boot", lambda: boot[::-1])
    assert leases.take(second) == {"taken": True, "held": None, "kept": True}, (
        "whoever held it before the boot is gone"
    )
    assert leases.renew(first) == {"mine": False}
    leases.give_back(first)
    assert leases.show(first)["held"]["holder"] == "second"
    (root / "lease").write_text("")
    assert leases.take(first)["taken"], "a loss of power may leave an empty file"


def test_within_a_lease_its_own_process_needs_no_other(root: Path) -> None:
    device = LocalDevice(root)
    with lease.held(device, "outer"):
        with lease.held(device, "inner"):
            pass
        assert lease.holder(Agent(device)) is not None
    assert lease.holder(Agent(device)) is None
    assert device.lease is None


@pytest.mark.parametrize("text", ["10", "5 x", "soon"])
def test_a_time_to_wait_has_a_unit(toolkit: Toolkit, job: Path, text: str) -> None:
    refused = toolkit(*PRUNE, "--wait", text)
    assert refused.returncode == 2
    assert (
        "write one of s, m, min, h" in refused.stderr or "not a number with a unit (s, m, min, h)" in refused.stderr
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a small disk")
def test_a_full_disk_can_be_pruned(toolkit: Toolkit, root: Path, tmp_path: Path) -> None:
    root.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(root)], check=True)
    try:
        agent = Agent(LocalDevice(root))
        ids = [delivery.push(small(tmp_path, name), agent) and small(tmp_path, name).id for name in "ab"]
        with contextlib.suppress(OSError), (root / "ballast").open("wb") as file:
            while True:
                file.write(b"x" * 4096)
        pruned = toolkit(*PRUNE)
        assert pruned.returncode == 0, pruned.stderr
        assert "the disk of this machine is too full for a lease" in pruned.stderr
        assert all(release in pruned.stdout for release in ids)
    finally:
        subprocess.run(["umount", str(root)], check=True)


@needs_sshd
def test_it_is_renewed_over_ssh_while_files_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWED_EVERY", 0.05)
    server = Server(tmp_path / "ssh")
    monkeypatch.setenv("TOOLKIT_SSH_CONFIG", str(server.config))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    server.start()
    try:
        device = SshDevice("orin", "~/.toolkit", sys.executable)
        content, file = os.urandom(8 << 20), Path(device.root) / "lease"
        with lease.held(device, "toolkit run orin"):
            began = json.loads(file.read_text())
            turn = 0
            while json.loads(file.read_text())["expires"] < began["expires"] + 1:
                device.put(content, f"{device.root}/incoming/{turn % 3}")
                assert Path(device.root, "incoming", str(turn % 3)).read_bytes() == content
                turn += 1
            assert json.loads(file.read_text())["since"] == began["since"]
        assert not file.exists()
    finally:
        server.stop()
        devices._connected.cache_clear()
