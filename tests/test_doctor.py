"""The doctor: its script under real shells, what it makes of devices that are not here, and its command line."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Toolkit
from toolkit import doctor, files, pipeline
from toolkit.agent import facts
from toolkit.checks import Check
from toolkit.console import Console
from toolkit.devices import probe
from toolkit.devices.local import LocalDevice
from toolkit.devices.probe import Probe
from toolkit.errors import StageError
from toolkit.stages import Runner
from toolkit.store import Store

NOW = 1_795_000_000
COMMON = f"""\
Welcome to Ubuntu! a=greeting
time={NOW}
os=Linux 5.15.148-tegra
distribution=Ubuntu 22.04.5 LTS
cores=12
load=0.31
place=/home/me/.toolkit
writable=yes
df=/dev/nvme0n1p1    479152840 38104012  416631680       9% /
"""
ORIN = (
    COMMON
    + """\
arch=aarch64
processor=
flags=fp asimd evtstrm aes
memory_kb=31364140
millidegrees=49875
millidegrees=-256000
millidegrees=
millidegrees=51343
current=97b379e0147d9eda
python=3.10.12
package=numpy 1.26.4
package=tensorrt 10.3.0
tensorrt_python=yes
gpu=Orin (nvgpu), [N/A], [N/A], [N/A]
compatible=nvidia,p3737-0000+p3701-0005 nvidia,p3701-0005 nvidia,tegra234 nvidia,tegra23x
model=NVIDIA Jetson AGX Orin Developer Kit
driver=NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build
cuda={"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}
debian=libnvinfer-bin 10.3.0.30-1+cuda12.5
debian=libnvinfer10 10.3.0.30-1+cuda12.5
trtexec=/usr/src/tensorrt/bin/trtexec
tegra=# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37
power=NV Power Mode: MODE_30W 2
clocks=no
docker=io.containerd.runc.v2 nvidia runc
end=yes
"""
)
T4 = (
    COMMON
    + """\
arch=x86_64
processor=Intel(R) Xeon(R) CPU @ 2.00GHz
flags=fpu avx2 avx512f
memory_kb=61000000
python=3.12.3
package=numpy 2.1.0
gpu=Tesla T4, 7.5, 15360, 84
gpu=Tesla T4, 7.5, 15360, 40
driver=NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:16:58 UTC 2025
clocks=sudo
docker=runc nvidia
end=yes
"""
)
BARE = f"""\
time={NOW + 3600}
arch=x86_64
os=Linux 6.1.0-30-amd64
distribution=Debian GNU/Linux 12 (bookworm)
processor=Intel(R) N100
flags=fpu sse2
cores=4
memory_kb=8000000
load=3.90
millidegrees=
place=/
df=/dev/sda1  30000000 29990000 10000 100% /
end=yes
"""


def parse(text: str) -> Probe:
    return probe.parse(text.splitlines(), NOW - 0.2, NOW + 0.3)


def judged(found: Probe, target: str, **changes: Any) -> dict[str, Check]:
    chosen = files.load_target(target).model_copy(update=changes)
    return {check.name: check for check in doctor.judge(found, chosen, "/home/me/.toolkit")}


def statuses(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.status for name, check in checks.items() if check.status != "pass"}


# --- the script ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["sh", "dash", "bash", "busybox"])
def shell(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a shell in the place of sh, busybox with all of its own programs."""
    program = shutil.which(request.param)
    if program is None:
        pytest.skip(f"{request.param} is not installed")
    tools = tmp_path / "bin"
    tools.mkdir()
    if request.param == "busybox":
        subprocess.run([program, "--install", "-s", str(tools)], check=True)
        monkeypatch.setenv("PATH", str(tools))
    else:
        (tools / "sh").symlink_to(program)
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return str(request.param)


def test_every_shell_finds_what_the_agent_finds(shell: str, tmp_path: Path) -> None:
    root = tmp_path / "a folder" / "releases"
    root.mkdir(parents=True)
    (root / "current").symlink_to("releases/97b379e0147d9eda")
    found = probe.probe(LocalDevice(root))
    told = facts.collect({"root": str(root)})
    shared = ("arch", "cpu", "memory_bytes", "os", "python", "runtimes", "gpus", "driver", "cuda", "l4t")
    assert {key: getattr(found, key) for key in shared} == {key: told[key] for key in shared}
    assert found.free_bytes == pytest.approx(told["free_bytes"], rel=0.05)
    assert found.cores >= told["cores"]
    assert found.numpy
    assert found.load is not None
    assert (found.place, found.writable) == (str(root), True)
    assert (found.current, found.locked, found.skew) == ("97b379e0147d9eda", False, 0.0)


def test_every_shell_sees_who_holds_the_lock(shell: str, tmp_path: Path) -> None:
    if shutil.which("flock") is None:
        pytest.skip("its tools have no flock, which the lock is probed with")
    with (tmp_path / "lock").open("w") as file:
        assert not probe.probe(LocalDevice(tmp_path)).locked
        fcntl.flock(file, fcntl.LOCK_EX)
        found = probe.probe(LocalDevice(tmp_path))
    assert found.locked
    assert found.lock_holder in (None, os.getpid())


def test_every_shell_sees_where_releases_cannot_go(shell: str, tmp_path: Path) -> None:
    absent = probe.probe(LocalDevice(tmp_path / "not" / "yet"))
    assert (absent.place, absent.writable) == (str(tmp_path), True)
    (tmp_path / "file").write_text("")
    blocked = probe.probe(LocalDevice(tmp_path / "file" / "releases"))
    assert (blocked.place, blocked.writable) == (str(tmp_path / "file"), False)


def test_the_script_changes_nothing(shell: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "lock").write_text("")
    before = [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]
    probe.probe(LocalDevice(root))
    assert [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))] == before


def test_what_programs_on_the_device_say(shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is an hour ahead, a GPU, docker without rights, and no Python."""
    programs = {
        "date": f"echo {int(time.time()) + 3600}",
        "nvidia-smi": "cat; echo 'Tesla T4, 7.5, 15360, 84'",  # cat: the script itself is not for its children
        "docker": "echo 'permission denied' >&2; exit 1",
        "nvpmodel": "printf 'NV Power Mode: MAXN\\n0\\n'",
    }
    tools = tmp_path / "programs"
    tools.mkdir()
    for name, body in programs.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    device = LocalDevice(tmp_path)
    device.python = "/no/such/python"
    found = probe.probe(device)
    assert found.skew is not None
    assert 3590 < found.skew < 3610
    assert [gpu["compute_capability"] for gpu in found.gpus] == ["sm_75"]
    assert found.temperature is not None
    assert found.temperature >= 84
    assert (found.container, found.container_problem) == ("docker", "permission denied")
    assert (found.python, found.numpy, found.power_mode) == (None, None, "MAXN")
    assert found.clocks == found.power_set
    assert found.clocks in ("root", "sudo", "no")


def test_a_device_without_a_shell_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sh").write_text(f"#!{shutil.which('sh')}\necho 'This account is not available' >&2\nexit 1\n")
    (tmp_path / "sh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StageError, match=r"could not be examined \(exit 1\): This account is not available"):
        probe.probe(LocalDevice(tmp_path))
    _, checks = doctor.examine_device(LocalDevice(tmp_path), files.load_target("host-cpu"))
    assert [(check.name, check.status) for check in checks] == [("reach", "fail")]


# --- devices that are not here -------------------------------------------------------------------------------


def test_an_orin_with_jetpack_6_2() -> None:
    found = parse(ORIN)
    assert (found.l4t, found.jetpack, found.cuda, found.driver) == ("36.4.3", "6.2", "12.6.11", "540.4.0")
    assert found.runtimes == {"tensorrt": "10.3.0.30"}
    assert found.gpus == [
        {
            "name": "NVIDIA Jetson AGX Orin Developer Kit",
            "compute_capability": "sm_87",
            "memory_bytes": 31364140 * 1024,
        }
    ]
    assert found.gpu_problem is None
    assert found.temperature == pytest.approx(51.343)
    assert found.power_mode == "MODE_30W"
    assert found.free_bytes == 416631680 * 1024
    checks = judged(found, "jetson-orin")
    assert statuses(checks) == {"clocks": "warn"}
    assert checks["runtime"].text == "TensorRT 10.3.0.30"
    assert "JetPack 6.2" in checks["nvidia"].text
    assert checks["release"].text == "97b379e0147d9eda is current"


def test_power_mode_and_clocks_that_a_target_asks_for() -> None:
    asked = {"power_mode": "MAXN", "clocks": "locked"}
    checks = judged(parse(ORIN), "jetson-orin", **asked)
    assert statuses(checks) == {"power mode": "fail", "clocks": "fail"}
    assert checks["power mode"].text == "MODE_30W, MAXN is asked for, and this user may not set it"
    may = parse(ORIN.replace("clocks=no", "clocks=sudo\npower_set=sudo"))
    checks = judged(may, "jetson-orin", **asked)
    assert statuses(checks) == {"power mode": "fail", "clocks": "fail"}
    assert checks["clocks"].hint == "sudo: true in the target file"
    assert statuses(judged(may, "jetson-orin", **asked, sudo=True)) == {}
    root = parse(ORIN.replace("clocks=no", "clocks=root\npower_set=root"))
    assert statuses(judged(root, "jetson-orin", **asked)) == {}
    assert statuses(judged(parse(ORIN), "jetson-orin", power_mode="MODE_30W")) == {"clocks": "warn"}
    nothing = parse(BARE.replace("place=/", "place=/\nwritable=yes"))
    checks = judged(nothing, "host-cpu", **asked)
    assert checks["power mode"].text == "it has no power modes"
    assert checks["clocks"].text == "it has none that can be locked"
    lines = [line for line in ORIN.splitlines() if not line.startswith(("debian=", "trtexec=", "package=tensorrt"))]
    assert statuses(judged(parse("\n".join(lines)), "jetson-orin", **asked)) == {"tuning": "fail"}


def test_an_orin_without_bindings_measures_latency_only() -> None:
    found = parse(ORIN.replace("tensorrt_python=yes\n", "").replace("package=tensorrt 10.3.0\n", ""))
    assert statuses(judged(found, "jetson-orin"))["bindings"] == "warn"
    neither = parse(ORIN.replace("tensorrt_python=yes\n", "").replace("trtexec=", "x="))
    assert statuses(judged(neither, "jetson-orin"))["bindings"] == "fail"


def test_an_orin_without_tensorrt_takes_a_container() -> None:
    lines = [line for line in ORIN.splitlines() if not line.startswith(("debian=", "trtexec=", "package=tensorrt"))]
    bare = "\n".join(lines)
    assert statuses(judged(parse(bare), "jetson-orin")) == {"clocks": "warn"}
    for docker, words in (
        ("docker=runc", "docker has no GPU support"),
        ("docker_problem=permission denied", "does not answer: permission denied"),
        ("", "there is no docker or podman"),
    ):
        check = judged(parse(bare.replace("docker=io.containerd.runc.v2 nvidia runc", docker)), "jetson-orin")[
            "container"
        ]
        assert check.status == "fail"
        assert words in check.text
        assert check.hint


def test_a_t4_server() -> None:
    found = parse(T4)
    assert [gpu["compute_capability"] for gpu in found.gpus] == ["sm_75", "sm_75"]
    assert (found.temperature, found.driver, found.container_gpu) == (84.0, "580.65.06", True)
    assert found.cpu.startswith("Intel(R) Xeon(R) CPU @ 2.00GHz (")
    checks = judged(found, "t4")
    assert statuses(checks) == {"temperature": "warn"}
    assert checks["container"].text == "docker, which can give the GPU to a container"
    assert statuses(judged(found, "a100"))["gpu"] == "fail"
    assert statuses(judged(found, "jetson-orin")) == {"system": "fail", "gpu": "fail", "temperature": "warn"}
    broken = parse(
        T4.replace("gpu=Tesla T4, 7.5, 15360, 84\ngpu=Tesla T4, 7.5, 15360, 40", "gpu=NVIDIA-SMI failed")
    )
    assert "nvidia-smi says NVIDIA-SMI failed" in judged(broken, "t4")["gpu"].text


def test_a_bare_debian() -> None:
    checks = judged(parse(BARE), "host-cpu")
    assert statuses(checks) == {
        "runtime": "fail",
        "alternative": "warn",
        "python": "fail",
        "root": "fail",
        "clock": "warn",
        "load": "warn",
    }
    assert all(check.hint for check in checks.values() if check.status != "pass")
    assert checks["clock"].text == "its clock is 1 h 00 min ahead"
    assert "/ cannot be written to" in checks["root"].text
    full = judged(parse(BARE.replace("place=/", "place=/\nwritable=yes")), "host-cpu")
    assert (full["root"].status, full["root"].hint) == ("fail", "free space there, or name another root")
    old = judged(parse(BARE.replace("end=yes", "python=3.6.9\nend=yes")), "host-cpu")
    assert old["python"].text == "Python 3.6.9 is too old"
    without = judged(parse(BARE.replace("end=yes", "python=3.11.2\nend=yes")), "host-cpu")
    assert without["numpy"].status == "fail"


# --- the command line ----------------------------------------------------------------------------------------


def test_without_a_target_it_examines_the_host_alone(toolkit: Toolkit) -> None:
    result = toolkit("doctor")
    assert result.returncode == 0, result.stdout
    assert f"pass  python        {platform.python_version()}" in result.stdout
    document = json.loads(toolkit("doctor", "--json").stdout)
    assert document["device"] is None
    assert [check["name"] for check in document["host"]["checks"]] == ["python", "torch", "build folder"]


def test_a_target_that_can_run_here(toolkit: Toolkit) -> None:
    result = toolkit("doctor", "host-cpu", "--json")
    assert result.returncode == 0, result.stdout
    device = json.loads(result.stdout)["device"]
    assert device["facts"]["python"] == platform.python_version()
    assert {check["name"] for check in device["checks"]} >= {"system", "runtime", "python", "numpy", "root"}
    assert "host-cpu, on this machine" in toolkit("doctor", "host-cpu").stdout


def test_a_target_that_cannot_exits_with_1(toolkit: Toolkit) -> None:
    result = toolkit("doctor", "jetson-orin" if platform.machine() == "x86_64" else "t4")
    assert result.returncode == 1
    assert f"it is {platform.machine()}, and the target" in result.stdout
    assert "hint:" in result.stdout


def test_a_host_without_a_target_is_refused(toolkit: Toolkit) -> None:
    result = toolkit("doctor", "--host", "orin")
    assert result.returncode == 2
    assert "hint: toolkit doctor TARGET --host orin" in result.stderr
    assert "Traceback" not in result.stderr


# --- before a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "stage"), [("linux", "push"), ("jetson-orin", "build")])
def test_a_run_says_first_what_its_device_lacks(
    target: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The device is this machine under another name, with a Python that is not there."""
    device = LocalDevice(tmp_path)
    device.python = "/no/such/python"
    monkeypatch.setattr(pipeline, "open_device", lambda host, *rest: device)
    chosen = files.load_target("host-cpu" if target == "linux" else target).model_copy(update={"host": "shelf"})
    job: Any = type("Job", (), {"target": chosen, "build": tmp_path / "build"})
    pipeline.foresee(job, Runner(Store(tmp_path / "store"), Console(quiet=True), "commit", frozenset(), False))
    told = capsys.readouterr().err
    assert f"the run will end before '{stage}':" in told
    assert ("Python does not run there" in told) == (target == "linux")


def test_a_run_here_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe", lambda device: sys.exit("asked"))
    job: Any = type("Job", (), {"target": files.load_target("host-cpu"), "build": tmp_path / "build"})
    pipeline.foresee(job, Runner(Store(tmp_path / "store"), Console(quiet=True), "commit", frozenset(), False))
