"""Power mode and clocks: set while something is measured, and set back whatever ends that; programs stand in."""

from __future__ import annotations

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

import jsonschema
import pytest

from tests.conftest import run_toolkit
from tests.integration import measuring
from tests.sshd import Server, needs_sshd
from tests.test_adopt import network
from tests.test_run import SCHEMA
from toolkit import devices
from toolkit.agent import PROTOCOL, knobs, programs, tuning
from toolkit.agent.protocol import Refusal
from toolkit.devices.agent import Agent
from toolkit.devices.local import LocalDevice
from toolkit.devices.ssh import SshDevice
from toolkit.errors import StageError

STANDINS = Path(__file__).with_name("standins") / "clocks"
MAXN = {"power_mode": "MAXN", "clocks": "locked", "sudo": True}
FOUND = {"mode": "2", "cpu_min": "729600", "cpu_max": "1728000", "gpu_min": "306000000"}
LOCKED = {"mode": "0", "cpu_min": "2201600", "cpu_max": "2201600", "gpu_min": "1300500000"}
T4 = {"persistence": "Disabled", "applications": [5001, 585], "default": [5001, 585], "max": [5001, 1590]}
H200 = {"persistence": "Enabled", "applications": None, "default": [3201, 1980], "max": [3201, 1980]}


class Machine:
    """What the stand-ins play: their programs in front of PATH, and what they are set to."""

    def __init__(self, folder: Path, *programs: str) -> None:
        self.state = folder / "state"
        self.programs = folder / "programs"
        self.root = folder / "root"
        for place in (self.state, self.programs, self.root):
            place.mkdir()
        for name in (*programs, "sudo"):
            shell = (STANDINS / name).read_text().startswith("#!/bin/sh")
            interpreter = "sh" if shell else f"{sys.executable} -SE"  # without site-packages: they start often
            (self.programs / name).write_text(f'#!/bin/sh\nexec {interpreter} {STANDINS}/{name} "$@"\n')
            (self.programs / name).chmod(0o755)
        self.set(sudoers="anybody ALL=(root) NOPASSWD: *")

    def set(self, **values: str) -> None:
        """Set what the stand-ins are set to."""
        for name, value in values.items():
            (self.state / name).write_text(value + "\n")

    def read(self) -> dict[str, str]:
        """Return what they are set to, as FOUND and LOCKED have it."""
        return {name: (self.state / name).read_text().strip() for name in FOUND}

    def gpus(self) -> Any:
        """Return what nvidia-smi is set to."""
        return json.loads((self.state / "gpus.json").read_text())

    @property
    def environment(self) -> dict[str, str]:
        """What makes the stand-ins this machine's programs."""
        path = f"{self.programs}:{os.environ['PATH']}"
        return {"PATH": path, "CLOCKS_STANDIN": str(self.state), "STANDIN_UID": "0"}

    def waits_for(self, state: dict[str, str]) -> bool:
        """Tell whether it comes to a state within 20 seconds."""
        deadline = time.monotonic() + 20
        while self.read() != state and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.read() == state

    @property
    def journal(self) -> Path:
        """What the agent writes down before it changes anything."""
        return self.root / "tuning.json"

    def is_left_alone(self) -> bool:
        """Tell whether all is as it was found, within 20 seconds, and nothing is left of the agent's."""
        deadline = time.monotonic() + 20
        while self.journal.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.read() == FOUND and not list(self.root.glob("tuning*"))


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path, "nvpmodel", "jetson_clocks")
    machine.set(reboot="", **FOUND)
    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)
    return machine


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with NVIDIA's GPUs, and without cpufreq."""
    machine = Machine(tmp_path, "nvidia-smi")
    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(knobs, "_GOVERNORS", str(tmp_path / "none" / "policy*" / "scaling_governor"))
    return machine


def play(machine: Machine, *gpus: dict[str, Any]) -> None:
    machine.set(**{"gpus.json": json.dumps([gpu | {"locked": None} for gpu in gpus])})


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("STANDIN_UID", "1000")


def ask(power_mode: str | None = None, clocks: str | None = None, sudo: bool = False) -> dict[str, Any]:
    return {"power_mode": power_mode, "clocks": clocks, "sudo": sudo}


# --- a Jetson ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["MAXN", "0"])
def test_mode_and_clocks_are_set_and_set_back(jetson: Machine, as_root: None, mode: str) -> None:
    with tuning.applied(str(jetson.root), ask(mode, "locked")) as tuned:
        assert jetson.read() == LOCKED
        journal = json.loads(jetson.journal.read_text())
        assert journal["found"]["power mode"] == {"id": "2", "name": "MODE_30W"}
    assert tuned == {
        "set": {"power mode": "MAXN", "clocks": "locked"},
        "found": {"power mode": "MODE_30W", "clocks": "floating"},
    }
    assert jetson.is_left_alone()


@pytest.mark.parametrize("clocks", ["locked", None])
def test_clocks_that_were_locked_are_so_again(jetson: Machine, as_root: None, clocks: str | None) -> None:
    """A power mode brings clocks of its own, in both directions."""
    jetson.set(**LOCKED)
    with tuning.applied(str(jetson.root), ask("MODE_15W", clocks)) as tuned:
        low = "1113600" if clocks else "729600"
        assert {"mode": "1", "cpu_min": low, "cpu_max": "1113600"}.items() <= jetson.read().items()
    assert tuned["found"] == {"power mode": "MAXN"} | ({"clocks": "locked"} if clocks else {})
    assert jetson.read() == LOCKED


def test_what_is_as_asked_for_takes_no_right(jetson: Machine, as_user: None) -> None:
    with tuning.applied(str(jetson.root), ask("MODE_30W")) as tuned:
        assert not jetson.journal.exists()
    assert tuned == {"set": {"power mode": "MODE_30W"}, "found": {"power mode": "MODE_30W"}}


def test_nothing_is_asked_when_nothing_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with tuning.applied(str(tmp_path), ask()) as tuned:
        assert tuned == {"set": {}, "found": {}}


def refused(machine: Machine, request: dict[str, Any]) -> Refusal:
    with pytest.raises(Refusal) as error, tuning.applied(str(machine.root), request):
        raise AssertionError("it was set")
    assert not list(machine.root.glob("tuning*"))
    return error.value


def test_an_unknown_mode_is_refused_with_those_there_are(jetson: Machine, as_root: None) -> None:
    problem = refused(jetson, ask("MAXQ"))
    assert problem.message == (
        "the device has no power mode 'MAXQ'; it has MAXN (0), MODE_15W (1), MODE_30W (2), MODE_50W (3)"
    )
    assert jetson.is_left_alone()


def test_a_mode_that_takes_a_reboot_is_refused_without_one(jetson: Machine, as_root: None) -> None:
    jetson.set(reboot="1 3")
    problem = refused(jetson, ask("MODE_15W", "locked"))
    assert problem.message == "the device has to be rebooted to change to power mode MODE_15W"
    assert problem.hint == "sudo nvpmodel -m 1 there, and let it reboot"
    assert not (jetson.state / "rebooted").exists()
    assert jetson.is_left_alone()


def test_what_stays_what_it_was_is_refused_with_both(jetson: Machine, as_root: None) -> None:
    (jetson.programs / "jetson_clocks").write_text(
        f'#!/bin/sh\n[ -n "$1" ] || exit 0\nexec {STANDINS}/jetson_clocks "$@"\n'
    )
    assert refused(jetson, ask("MAXN", "locked")).message == "clocks should be locked and stays floating"
    assert jetson.is_left_alone()
    jetson.set(stuck="")
    assert refused(jetson, ask("MAXN")).message == "nvpmodel does not set MAXN: it says nothing"


def test_a_device_without_modes_or_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "_SYSTEM", "")
    monkeypatch.setattr(knobs, "_GOVERNORS", str(tmp_path / "*"))
    for request, words, key in (
        (ask("MAXN"), "the device has no power modes", "power_mode"),
        (ask(clocks="locked"), "the device has no clocks that can be locked", "clocks"),
    ):
        with pytest.raises(Refusal, match=words) as error, tuning.applied(str(tmp_path), request):
            pass
        assert error.value.hint == f"leave out {key} in the target file"


def test_a_container_is_refused(jetson: Machine, as_root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_IMAGE", "nvcr.io/nvidia/tensorrt:26.05-py3@sha256:0")
    assert "cannot be set from inside a container" in refused(jetson, ask("MAXN")).message


# --- rights --------------------------------------------------------------------------------------------------


def test_the_line_for_sudoers_is_enough(jetson: Machine, as_user: None) -> None:
    jetson.set(sudoers="")
    problem = refused(jetson, ask("MAXN", "locked"))
    assert problem.message == "power mode and clocks are set by root, which this user is not"
    assert "set sudo: true in the target file" in str(problem.hint)
    problem = refused(jetson, ask("MAXN", "locked", sudo=True))
    assert problem.message.endswith("sudo: a password is required")
    line = str(problem.hint).partition("visudo -f: ")[2]
    assert f"{jetson.programs}/nvpmodel -m [0-9]" in line
    jetson.set(sudoers=line)
    with tuning.applied(str(jetson.root), ask("MAXN", "locked", sudo=True)):
        assert jetson.read() == LOCKED
    assert jetson.is_left_alone()


@pytest.mark.parametrize("gpu", [T4, H200], ids=["application clocks", "locked clocks"])
def test_the_line_for_sudoers_is_enough_on_a_server(
    server: Machine, as_user: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: dict[str, Any]
) -> None:
    play(server, gpu, gpu | {"max": [5001, 1380]})
    governors(tmp_path, monkeypatch, "schedutil")
    before = server.gpus()
    server.set(sudoers="")
    line = str(refused(server, ask(clocks="locked")).hint).partition("visudo -f: ")[2]
    server.set(sudoers=line)
    with tuning.applied(str(server.root), ask(clocks="locked", sudo=True)) as tuned:
        pass
    assert tuned["set"]["CPU governor"] == "performance"
    assert server.gpus() == before


def test_no_right_to_go_back_is_no_right_to_set_out(jetson: Machine, as_user: None) -> None:
    (jetson.programs / "jetson_clocks").unlink()
    jetson.set(sudoers=f"me ALL=(root) NOPASSWD: {jetson.programs}/nvpmodel -m 0")
    problem = refused(jetson, ask("MAXN", sudo=True))
    assert problem.message.startswith(f"sudo does not run {jetson.programs}/nvpmodel -m 2")
    assert jetson.is_left_alone()


# --- a server, an ordinary machine ----------------------------------------------------------------------------


def test_application_clocks(server: Machine, as_root: None) -> None:
    tuned_before = T4 | {"persistence": "Enabled", "applications": [5001, 900]}
    play(server, T4, tuned_before)
    before = server.gpus()
    with tuning.applied(str(server.root), ask(clocks="locked")) as tuned:
        assert [gpu["applications"] for gpu in server.gpus()] == [[5001, 1590]] * 2
    assert tuned == {
        "set": {"persistence mode": "Enabled", "application clocks": "5001,1590 MHz"},
        "found": {
            "persistence mode": "Disabled and Enabled",
            "application clocks": "5001,585 and 5001,900 MHz",
        },
    }
    assert server.gpus() == before


def test_clocks_are_locked_where_there_are_no_application_clocks(server: Machine, as_root: None) -> None:
    play(server, H200)
    with tuning.applied(str(server.root), ask(clocks="locked")) as tuned:
        assert server.gpus()[0]["locked"] == 1980
    assert tuned == {
        "set": {"persistence mode": "Enabled", "GPU clocks": "1980 MHz"},
        "found": {"persistence mode": "Enabled", "GPU clocks": "unknown"},
    }
    assert server.gpus()[0]["locked"] is None


def governors(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> list[Path]:
    files = []
    for index, name in enumerate(names):
        files.append(folder / "cpufreq" / f"policy{index}" / "scaling_governor")
        files[-1].parent.mkdir(parents=True)
        files[-1].write_text(name + "\n")
    monkeypatch.setattr(knobs, "_GOVERNORS", str(folder / "cpufreq" / "policy*" / "scaling_governor"))
    return files


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a /sys/devices/system/cpu")
def test_the_governor_of_an_ordinary_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole agent, its guardian too, sees another cpufreq."""
    (tmp_path / "cpu").mkdir()
    files = governors(tmp_path / "cpu", monkeypatch, "schedutil", "powersave")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    device = LocalDevice(tmp_path / "root")
    release = measuring.deliver(device, tmp_path)
    request = bench_request(device, release.id, ask(clocks="locked"), duration_ms=500)
    mounted = (
        f"mount --bind {tmp_path}/cpu /sys/devices/system/cpu && exec {sys.executable} {Agent(device).place} bench"
    )
    agent = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", mounted],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        text=True,
    )
    assert agent.stdin
    agent.stdin.write(request)
    agent.stdin.close()
    deadline = time.monotonic() + 20
    while [file.read_text() for file in files] != ["performance"] * 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [file.read_text() for file in files] == ["performance"] * 2
    assert agent.stdout
    answer = json.loads(agent.stdout.read().splitlines()[-1])
    agent.wait()
    assert answer["value"]["tuning"] == {
        "set": {"CPU governor": "performance"},
        "found": {"CPU governor": "powersave and schedutil"},
    }
    assert [file.read_text().strip() for file in files] == ["schedutil", "powersave"]


# --- whatever ends it -----------------------------------------------------------------------------------------


def bench_request(device: Any, release: str, wanted: dict[str, Any], **settings: Any) -> str:
    place = {"root": device.root, "release": f"{device.root}/releases/{release}", "out": f"{device.root}/measured"}
    return json.dumps(measuring.SETTINGS | place | {"tuning": wanted, "protocol": PROTOCOL} | settings)


@pytest.fixture
def measuring_agent(jetson: Machine, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """An agent in the middle of a benchmark with locked clocks."""
    device = LocalDevice(jetson.root)
    release = measuring.deliver(device, tmp_path)
    agent = subprocess.Popen(
        [sys.executable, Agent(device).place, "bench"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert agent.stdin
    lasting = [{"name": "SingleStream", "duration_ms": 60_000, "queries": 1}]
    agent.stdin.write(bench_request(device, release.id, MAXN, scenarios=lasting))
    agent.stdin.close()
    assert jetson.waits_for(LOCKED)
    assert agent.stdout
    while json.loads(agent.stdout.readline())["text"] != "SingleStream, 60 s":
        pass
    yield agent
    agent.kill()
    agent.wait()


def guardian_of(agent: int) -> int:
    """Return the child that is not telemetry's."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    (guardian,) = (child for child in children if b"tuning.guard" in Path(f"/proc/{child}/cmdline").read_bytes())
    return int(guardian)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal(jetson: Machine, measuring_agent: subprocess.Popen[str], number: int) -> None:
    measuring_agent.send_signal(number)
    measuring_agent.wait(10)
    assert jetson.is_left_alone()


def test_the_guardian_heeds_no_signal_and_holds_no_stream(
    jetson: Machine, measuring_agent: subprocess.Popen[str]
) -> None:
    guardian = guardian_of(measuring_agent.pid)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        os.kill(guardian, number)
    assert measuring_agent.stdout
    ours = os.fstat(measuring_agent.stdout.fileno()).st_ino  # the other end of the pipe has the same number
    assert ours not in [path.stat().st_ino for path in Path(f"/proc/{guardian}/fd").iterdir()]
    assert os.getsid(guardian) == guardian
    measuring_agent.kill()
    assert jetson.is_left_alone()


def test_without_its_guardian_the_agent_sets_back_by_itself(
    jetson: Machine, measuring_agent: subprocess.Popen[str]
) -> None:
    os.kill(guardian_of(measuring_agent.pid), signal.SIGKILL)
    measuring_agent.terminate()
    measuring_agent.wait(10)
    assert jetson.is_left_alone()


@pytest.mark.parametrize("verb", ["build", "activate", "bench"])
def test_without_either_the_next_verb_does(
    jetson: Machine, measuring_agent: subprocess.Popen[str], verb: str
) -> None:
    os.kill(guardian_of(measuring_agent.pid), signal.SIGKILL)
    measuring_agent.kill()
    measuring_agent.wait()
    assert jetson.read() == LOCKED
    request = {"root": str(jetson.root), "id": "none", "release": f"{jetson.root}/releases/none"}
    Agent(LocalDevice(jetson.root)).ask("facts", request)
    assert jetson.read() == LOCKED, "a verb that runs nothing leaves it"
    with pytest.raises(StageError):
        Agent(LocalDevice(jetson.root)).ask(verb, request | {"out": f"{jetson.root}/out", "runtime": "none"})
    assert jetson.is_left_alone()


def test_the_next_benchmark_waits_until_all_is_set_back(
    jetson: Machine, measuring_agent: subprocess.Popen[str], tmp_path: Path
) -> None:
    guardian = guardian_of(measuring_agent.pid)
    os.kill(guardian, signal.SIGSTOP)
    measuring_agent.kill()
    threading.Timer(1, os.kill, (guardian, signal.SIGCONT)).start()
    (release,) = (jetson.root / "releases").iterdir()
    device = LocalDevice(jetson.root)
    request = json.loads(bench_request(device, release.name, MAXN))
    assert Agent(device).ask("bench", request)["tuning"]["found"]["power mode"] == "MODE_30W"
    assert jetson.is_left_alone()


def test_after_a_power_loss_only_what_survives_a_reboot_is_set_back(jetson: Machine, tmp_path: Path) -> None:
    jetson.set(mode="0", cpu_max="2201600")  # as the device comes up in the mode that it was left in
    stored = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq:1\n/sys/class/devfreq/x.ga10b/min_freq:1\n"
    found = {"power mode": {"id": "2", "name": "MODE_30W"}, "clocks": {"stored": stored, "locked": False}}
    jetson.journal.write_text(json.dumps({"boot": "the one before", "sudo": True, "found": found}))
    measuring.deliver(LocalDevice(jetson.root), tmp_path)
    assert jetson.is_left_alone()


def test_what_cannot_be_set_back_is_said_and_done_later(jetson: Machine, tmp_path: Path) -> None:
    jetson.set(reboot="2", mode="0", cpu_max="2201600")
    found = {"power mode": {"id": "2", "name": "MODE_30W"}}
    jetson.journal.write_text(json.dumps({"boot": "the one before", "sudo": True, "found": found}))
    device = LocalDevice(jetson.root)
    with pytest.raises(StageError) as error:
        measuring.deliver(device, tmp_path)
    assert error.value.message == (
        "this machine: the device is not set back to what it was before a benchmark: "
        "the device has to be rebooted to change to power mode MODE_30W"
    )
    assert "sudo nvpmodel -m 2 there" in str(error.value.hint)
    assert jetson.journal.exists()
    with pytest.raises(StageError, match="there is no release none"):
        Agent(device).ask("activate", {"root": device.root, "id": "none"})
    jetson.set(mode="2", cpu_max="1728000")  # it was rebooted by hand
    measuring.deliver(device, tmp_path)
    assert jetson.is_left_alone()


# --- over SSH --------------------------------------------------------------------------------------------------


@pytest.fixture
def orin(
    jetson: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, Callable[[], SshDevice]]]:
    """A Jetson over SSH, whose Python sees the programs of a Jetson."""
    sshd = Server(tmp_path / "ssh")
    monkeypatch.setenv("TOOLKIT_SSH_CONFIG", str(sshd.config))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    devices._connected.cache_clear()
    python = tmp_path / "python"
    settings = " ".join(f"{name}='{value}'" for name, value in jetson.environment.items())
    python.write_text(f'#!/bin/sh\nexec env {settings} {sys.executable} "$@"\n')
    python.chmod(0o755)
    sshd.start()
    yield sshd, lambda: SshDevice("orin", str(jetson.root), str(python))
    sshd.stop()


@needs_sshd
def test_a_benchmark_over_ssh(
    orin: tuple[Server, Callable[[], SshDevice]], jetson: Machine, tmp_path: Path
) -> None:
    measured = measuring.measure(orin[1](), tmp_path, tuning=MAXN)
    assert measured["tuning"]["set"] == {"power mode": "MAXN", "clocks": "locked"}
    assert jetson.is_left_alone()


@needs_sshd
@pytest.mark.parametrize("what", ["session", "agent", "both"])
def test_a_connection_that_dies(
    orin: tuple[Server, Callable[[], SshDevice]], jetson: Machine, tmp_path: Path, what: str
) -> None:
    sshd, connect = orin
    device = connect()
    release = measuring.deliver(device, tmp_path)
    seen: list[str] = []

    def kill(done: int, total: int, text: str) -> None:
        if seen:
            return
        seen.append(text)
        assert jetson.read() == LOCKED
        if what != "session":
            asked = os.fsencode(f"{Agent(device).place}\0bench")
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                if asked in process.read_bytes():
                    os.kill(int(process.parent.name), signal.SIGKILL)
        if what != "agent":
            sshd.stop()

    request = json.loads(bench_request(device, release.id, MAXN, duration_ms=60_000))
    with pytest.raises(StageError, match="broke off"):
        Agent(device).ask("bench", request, progress=kill)
    assert seen
    assert jetson.is_left_alone()


# --- the run ---------------------------------------------------------------------------------------------------


def test_a_run_says_what_was_set_and_measures_anew_when_that_changes(jetson: Machine, job: Path) -> None:
    network(job / "net.onnx")
    target = job / "targets" / "tiny.yaml"
    plain = target.read_text()
    arguments = ("--model", "onnx:net.onnx", "--data", "none", "--mean", "0.5", "--std", "0.25", "--json")
    runs = []
    for keys, said in (
        ("", ""),
        ("power_mode: MAXN\nclocks: locked\nsudo: true\n", ", clocks locked, power mode MAXN\n"),
        ("power_mode: 1\nsudo: true\n", ", power mode MODE_15W\n"),
    ):
        target.write_text(plain + keys)
        result = run_toolkit(job, "run", "tiny", *arguments)
        assert result.returncode == 1, result.stderr
        assert said in result.stderr
        runs.append(json.loads(result.stdout))
        jsonschema.validate(runs[-1], SCHEMA)
    assert [run["bench"]["tuning"]["found"] for run in runs] == [
        {},
        {"power mode": "MODE_30W", "clocks": "floating"},
        {"power mode": "MODE_30W"},
    ]
    assert "found as MODE_30W, and left so" in (job / runs[-1]["report"]).read_text()
    assert len({run["artifacts"]["bench"] for run in runs}) == 3
    assert len({run["artifacts"]["build"] for run in runs}) == 1
