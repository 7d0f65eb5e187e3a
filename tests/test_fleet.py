"""Many devices: real ones, each a user of an OpenSSH server on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.conftest import PROFILE, TARGET, run_toolkit, write_job
from tests.faults import compose, problem
from tests.sshd import Server, needs_sshd
from toolkit.commands.options import target_from
from toolkit.config import Target
from toolkit.delivery import fleet, upkeep
from toolkit.delivery import release as delivery
from toolkit.devices import open_device
from toolkit.devices.agent import Agent
from toolkit.errors import StageError, UsageError
from toolkit.report import document

USERS = ("a", "b", "c", "d", "e")
HUNGRY = """\
import sys
if "bench" in sys.orig_argv:
    eaten = b"x" * 800_000_000
"""


# --- waves, and many at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hosts", "sizes"),
    [
        ("1,10%,100%", 50, [1, 4, 45]),
        ("1,10%,100%", 3, [1, 1, 1]),
        ("1,10%,100%", 1, [1]),
        ("5, 2, 100%", 9, [5, 1, 3]),
        ("100%", 4, [4]),
        ("2,99", 4, [2, 2]),
        ("34%,100%", 3, [2, 1]),
    ],
)
def test_waves(text: str, hosts: int, sizes: list[int]) -> None:
    names = [str(number) for number in range(hosts)]
    found = fleet.waves(text, names)
    assert [len(wave) for wave in found] == sizes
    assert [name for wave in found for name in wave] == names


@pytest.mark.parametrize("text", ["", "0,100%", "half,100%", "-1,100%", "1,,100%", "1", "1,50%", "1.5,100%"])
def test_what_is_no_waves(text: str) -> None:
    with pytest.raises(UsageError, match="--waves"):
        fleet.waves(text, ["a", "b", "c"])


def test_each_host_has_its_own_result_and_no_more_are_at_work_than_allowed() -> None:
    at_work: list[int] = []
    now = threading.Semaphore(2)

    def work(host: str) -> str:
        assert now.acquire(blocking=False), "more than two at a time"
        at_work.append(1)
        time.sleep(0.02)
        now.release()
        if host == "bad":
            raise StageError("it failed")
        return host.upper()

    found = fleet.each(["a", "bad", "b", "c"], work, 2)
    assert list(found) == ["a", "bad", "b", "c"]
    assert (found["a"], found["b"], found["c"]) == ("A", "B", "C")
    assert isinstance(found["bad"], StageError)
    assert len(at_work) == 4


def test_a_bug_keeps_its_traceback_and_the_others_go_on() -> None:
    seen = []

    def work(host: str) -> None:
        seen.append(host)
        if host == "a":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fleet.each(["a", "b"], work, 1)
    assert seen == ["a", "b"]


def test_no_host_is_begun_once_it_is_stopped() -> None:
    stop = threading.Event()
    assert list(fleet.each(["a", "b", "c"], lambda host: stop.set() if host == "b" else None, 1, stop)) == [
        "a",
        "b",
    ]


def test_whose_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet_of = "hosts: [a, b, a]\ngroups: {lab: [b, c], shop: [d]}\n"
    monkeypatch.chdir(write_job(tmp_path, target=TARGET + fleet_of))
    assert target_from("tiny", None).fleet == ["a", "b", "c", "d"]
    assert target_from("tiny", None, group="lab").fleet == ["b", "c"]
    assert target_from("tiny", None, hosts="x, y,x").fleet == ["x", "y"]
    one = target_from("tiny", "z")
    assert (one.fleet, one.host) == ([], "z")
    with pytest.raises(UsageError, match="no group 'lap'") as error:
        target_from("tiny", None, group="lap")
    assert error.value.hint == "did you mean 'lab'?"
    with pytest.raises(UsageError, match="--host, --hosts and --group"):
        target_from("tiny", "z", hosts="x")
    with pytest.raises(ValueError, match="'host' names one device"):
        Target(name="t", profile="tiny", runtime="onnxruntime", host="a", hosts=["b"])


def test_waves_are_for_a_fleet_that_commits(job: Path) -> None:
    for arguments, words in (
        (("run", "tiny", "--waves", "1,100%"), "one device is meant"),
        (("run", "tiny", "--hosts", "a,b", "--waves", "1,100%", "--fast"), "a fast run is not"),
        (("run", "tiny", "--hosts", "a,b", "--waves", "1"), "ends at 1 of 2 hosts"),
    ):
        result = run_toolkit(job, *arguments)
        assert result.returncode == 2, result.stderr
        assert words in result.stderr
        assert "Traceback" not in result.stderr


@needs_sshd
def test_fifty_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that runs is pushed, verified and switched to on each; those that have it get nothing again."""
    hosts = [f"device{number}" for number in range(50)]
    server = Server(tmp_path / "ssh", hosts)
    monkeypatch.setenv("TOOLKIT_SSH_CONFIG", str(server.config))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    release = compose(tmp_path / "release", 1, size=20_000)
    target = Target(name="fifty", profile="none", runtime="onnxruntime", python=sys.executable)

    def push(host: str) -> int:
        return delivery.push(release, Agent(open_device(host, target, tmp_path))).sent_bytes

    def deliver(host: str) -> str:
        sent = push(host)
        assert sent > 20_000
        activated = upkeep.activate(release.id, Agent(open_device(host, target, tmp_path)))
        return str(activated["current"])

    server.start()
    try:
        assert fleet.each(hosts, deliver, 8) == dict.fromkeys(hosts, release.id)
        assert fleet.each(hosts, push, 8) == dict.fromkeys(hosts, 0)
    finally:
        server.stop()
    for host in hosts:
        assert problem((server.home(host) / ".toolkit" / "current").resolve(strict=True)) is None


# --- real devices --------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(tmp_path / "ssh", USERS)
    monkeypatch.setenv("TOOLKIT_SSH_CONFIG", str(server.config))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    for user in USERS:
        python(server, user, f'exec {sys.executable} "$@"')
    full = server.home("c") / ".toolkit"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(full)], check=True)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with server.config.open("a") as config:
            config.write(f"Host gone\n  HostName 127.0.0.1\n  Port {closed.getsockname()[1]}\n")
        try:
            server.start()
            yield server
        finally:
            server.stop()
            subprocess.run(["umount", str(full)], check=True)


def python(server: Server, user: str, script: str) -> None:
    """Give a device its Python, below the home that commands start in."""
    path = server.home(user) / "bin" / "python"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def folder(finished_copy: Path) -> Path:
    """The finished job with a fleet for its target; its engine is still to be built."""
    write_job(
        finished_copy,
        PROFILE.replace("latency_p99: 1 s", "peak_memory: 600 MB"),
        TARGET + "python: bin/python\nhosts: [a, c, gone, b]\ngroups: {sound: [a, b]}\n",
    )
    shutil.rmtree(finished_copy / "build" / "store" / "build")
    return finished_copy


def run(folder: Path, *arguments: str, code: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    verb, *others = arguments
    result = run_toolkit(folder, verb, "--precision", "int8", "--json", *others)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    told = json.loads(result.stdout)
    jsonschema.validate(told, json.loads(document.SCHEMA.read_text()))
    return told, {host["host"]: host for host in told["hosts"]}


def current(server: Server, user: str) -> str | None:
    link = server.home(user) / ".toolkit" / "current"
    return link.resolve(strict=True).name if link.is_symlink() else None


@needs_sshd
def test_each_host_stands_for_itself(server: Server, folder: Path) -> None:
    told, hosts = run(folder, "run", "tiny", code=1)
    assert list(hosts) == ["a", "c", "gone", "b"]
    assert [host["status"] for host in hosts.values()] == ["committed", "failed", "failed", "committed"]
    # it may also be the one that builds
    no_room = r"bytes free and the release needs|there is no room left for"
    assert re.search(no_room, hosts["c"]["error"]["message"])
    assert "Connection refused" in hosts["gone"]["error"]["message"]
    assert current(server, "a") == current(server, "b") == hosts["a"]["commit"]["release"]
    built = [stage["cached"] for host in hosts.values() for stage in host["stages"] if stage["name"] == "build"]
    assert built.count(False) == 1, "built once, for all that have room"
    assert hosts["a"]["artifacts"]["bench"] != hosts["b"]["artifacts"]["bench"], "each is measured"
    assert {stage["name"] for stage in told["stages"]} >= {"train", "quantize"}

    again = run_toolkit(folder, "run", "tiny", "--group", "sound", "--precision", "int8")
    assert again.returncode == 0, again.stderr
    head, a, b, counts = again.stdout.splitlines()
    assert head.split() == ["host", "current", "p99", "result"]
    assert a.startswith(f"a     {current(server, 'a')}")
    assert b.endswith("committed: it is the current release already")
    assert counts == "2 hosts: 2 committed"
    assert "waiting" not in again.stderr
    assert f"b  push      the device has all of it, verified there: release {current(server, 'b')}" in again.stderr

    listed = json.loads(run_toolkit(folder, "releases", "tiny", "--hosts", "b,gone", "--json").stdout)["devices"]
    assert listed[0]["releases"][0]["current"]
    assert "Connection refused" in listed[1]["error"]["message"]
    garbage = run_toolkit(folder, "gc", "--keep", "1").stdout
    for made in (hosts["a"]["artifacts"], hosts["b"]["artifacts"]):
        assert not any(key in garbage for key in made.values()), "what a host's entry refers to stays"


@needs_sshd
def test_a_push_and_what_is_done_once(server: Server, folder: Path) -> None:
    _, hosts = run(folder, "push", "tiny", "--hosts", "a,b,a", "--parallel", "1", code=0)
    assert [(host, entry["status"]) for host, entry in hosts.items()] == [("a", "done"), ("b", "done")]
    assert current(server, "a") is None
    _, hosts = run(folder, "export", "tiny", code=0)
    assert hosts == {}
    plan = run_toolkit(folder, "plan", "tiny", "--hosts", "d,e", "--precision", "int8").stdout.splitlines()
    assert plan[0] == "on d, the first of 2 hosts"
    assert [line.split()[0] for line in plan if "would" in line] == ["push", "bench", "report"]


@needs_sshd
def test_a_failed_wave_goes_back_and_ends_the_rollout(server: Server, folder: Path) -> None:
    _, before = run(folder, "run", "tiny", "--hosts", "a,b,d", "--precision", "fp32", code=0)
    (old,) = {host["commit"]["current"] for host in before.values()}
    (server.home("b") / "hungry").mkdir()
    (server.home("b") / "hungry" / "sitecustomize.py").write_text(HUNGRY)
    python(server, "b", f'PYTHONPATH=$HOME/hungry exec {sys.executable} "$@"')
    (server.home("c") / "bin" / "python").unlink()
    waves = ("--hosts", "a,d,e,b,c", "--waves", "1,4,100%", "--parallel", "1")
    _, after = run(folder, "run", "tiny", *waves, code=1)
    assert {name: host["status"] for name, host in after.items()} == {
        "a": "committed",
        "d": "rolled back",
        "e": "committed",
        "b": "not committed",
        "c": "not reached",
    }
    assert [host["wave"] for host in after.values()] == [1, 2, 2, 2, 3]
    assert current(server, "a") == after["a"]["commit"]["release"] != old
    assert current(server, "d") == current(server, "b") == after["d"]["current"] == old
    assert "no previous release to go back to" in after["e"]["reason"]
    assert current(server, "e") == current(server, "a")


@needs_sshd
def test_ctrl_c_ends_the_work_there_and_says_how_far_it_is(server: Server, folder: Path) -> None:
    hang = "for r in releases/*; do mkdir -p measured/${r##*/}; done; echo $$ > $HOME/pid; exec sleep 300"
    python(server, "b", f'[ "$2" != bench ] || {{ cd $HOME/.toolkit; {hang}; }}; exec {sys.executable} "$@"')
    command = [sys.executable, "-m", "toolkit", "run", "tiny", "--hosts", "a,b,d", "--parallel", "2", "--json"]
    with (folder / "told").open("w") as told:
        process = subprocess.Popen(
            [*command, "--precision", "int8"], cwd=folder, stdout=subprocess.PIPE, stderr=told, text=True
        )
    pid, end = server.home("b") / "pid", time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if pid.exists() and "d  committed" in (folder / "told").read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    text = (folder / "told").read_text()
    assert process.returncode == 130, text
    assert "Traceback" not in text
    hosts = {host["host"]: host for host in json.loads(printed)["hosts"]}
    assert [hosts[name]["status"] for name in "abd"] == ["committed", "failed", "committed"]
    assert "'b' was broken off" in hosts["b"]["error"]["message"]
    assert not list((server.home("b") / ".toolkit" / "measured").iterdir()), "it is put in order"
    for _ in range(300):
        if not Path(f"/proc/{pid.read_text().strip()}").exists():
            break
        time.sleep(0.1)
    else:
        raise AssertionError("what ran on the device goes on")


@needs_sshd
def test_the_doctor_and_a_rollback(server: Server, folder: Path) -> None:
    result = run_toolkit(folder, "doctor", "tiny", "--hosts", "a,gone", "--json")
    assert result.returncode == 1
    one, two = json.loads(result.stdout)["devices"]
    assert one["facts"]["numpy"]
    assert two["checks"][0]["name"] == "reach"
    server.known.write_text("")
    assert "is not known" in run_toolkit(folder, "rollback", "tiny", "--host", "a").stderr
    result = run_toolkit(folder, "rollback", "tiny", "--hosts", "a,b", "--accept-new-host-key")
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "a", "b", "b"]
    assert "there is no previous release on a" in lines[0]


@needs_sshd
def test_an_unchanged_rollout_imports_nothing_heavy(server: Server, folder: Path) -> None:
    arguments = ["run", "tiny", "--group", "sound", "--precision", "int8", "--json"]
    assert run_toolkit(folder, *arguments).returncode == 0
    code = (
        "import sys\nfrom toolkit.cli import cli\n"
        f"try:\n    cli({arguments!r})\nexcept SystemExit as e: assert e.code == 0\n"
        "print(sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True, env=os.environ
    )
    loaded = result.stderr.splitlines()[-1]
    for heavy in ("torch", "modelopt", "onnx", "onnxruntime", "vl_convert", "sklearn"):
        assert f"'{heavy}'" not in loaded


@needs_sshd
def test_a_terminal_shows_a_row_a_host(server: Server, folder: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkit", "run", "tiny", "--precision", "int8"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "160"},
    )
    os.close(theirs)
    shown = ""
    with contextlib.suppress(OSError):  # the other end is closed
        while block := os.read(ours, 1 << 16):
            shown += block.decode(errors="replace")
    os.close(ours)
    table, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    for host in "ab":
        assert re.search(rf"{host} +[━╸╺]+ +bench", plain), "a row with its progress"
        assert f"{host}     committed: it kept its contract" in plain
    assert table.splitlines()[-1] == "4 hosts: 2 committed, 2 failed"
