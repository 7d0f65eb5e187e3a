"""What a device tells of itself while something is measured: stand-ins for its sensors, and this machine."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolkit.agent import nvml, sensors, tegrastats, telemetry
from toolkit.devices.agent import PACKAGE, pack

STANDINS = Path(__file__).parent / "standins" / "telemetry"
FILES = {
    "proc/stat": "cpu  1000 0 500 8000 100 0 0 400 0 0\ncpu0 1000 0 500 8000 100 0 0 400 0 0\n",
    "proc/meminfo": "MemTotal:        2000000 kB\nMemFree:  1 kB\nMemAvailable:    1500000 kB\nHugePages: 0\n",
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: a CPU\n",
    "proc/7/stat": "7 (python -c ) S 1 7 7 0 -1 0 0 0 0 0 100 20 0 0 20 0 1 0",
}
CPU = "sys/devices/system/cpu/"


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """The root of a device that tells nothing but load and memory."""
    return write(tmp_path / "device", FILES)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def read(source: sensors.Source) -> dict[str, float | None]:
    """Return what a source says by the names of its channels."""
    return dict(zip((channel.name for channel in source.channels), source.read(), strict=True))


# --- Linux -----------------------------------------------------------------------------------------------------


def test_clocks_of_cpufreq(device: Path) -> None:
    write(device, {f"{CPU}cpu{cpu}/cpufreq/scaling_cur_freq": f"{cpu}100000\n" for cpu in (0, 2, 10)})
    source = sensors.cpu_clocks(str(device))
    assert read(source) == {"cpu0 clock": 100, "cpu2 clock": 2100, "cpu10 clock": 10100}
    assert [channel.name for channel in source.channels][1:] == ["cpu2 clock", "cpu10 clock"]
    shutil.rmtree(device / CPU / "cpu2")  # it was taken off line
    assert read(source)["cpu2 clock"] is None


def test_clocks_without_cpufreq_count_where_they_are_measured(device: Path) -> None:
    cpu = "processor\t: {}\nflags\t\t: fpu {} tsc\ncpu MHz\t\t: {}.5\n"
    write(device, {"proc/cpuinfo": "\n".join(cpu.format(n, "aperfmperf", 2000 + n) for n in range(2))})
    assert read(sensors.cpu_clocks(str(device))) == {"cpu0 clock": 2000.5, "cpu1 clock": 2001.5}
    write(device, {"proc/cpuinfo": cpu.format(0, "hypervisor", 2000)})
    source = sensors.cpu_clocks(str(device))
    assert source.channels == source.read() == []
    assert source.notes == ["/proc/cpuinfo: tells the CPUs' nominal clock only, as in most virtual machines"]


def test_temperatures_of_thermal_zones(device: Path) -> None:
    for zone, (kind, degrees) in enumerate((("acpitz", "27800"), ("acpitz", "29800"), ("x86_pkg_temp", "55000"))):
        folder = f"sys/class/thermal/thermal_zone{zone}"
        write(device, {f"{folder}/type": kind + "\n", f"{folder}/temp": degrees + "\n"})
    write(device, {"sys/class/thermal/thermal_zone3/type": "CV0-therm\n"})
    source = sensors.thermal_zones(str(device))
    assert read(source) == {
        "acpitz 0 temperature": pytest.approx(27.8),
        "acpitz 1 temperature": pytest.approx(29.8),
        "x86_pkg_temp temperature": 55,
    }
    path = device / "sys/class/thermal/thermal_zone3/temp"
    assert source.notes == [
        f"thermal zone: CV0-therm temperature cannot be read ({path}: No such file or directory)"
    ]


def test_monitors_of_hardware(device: Path) -> None:
    chips: dict[str, dict[str, str]] = {
        "k10temp": {"temp1_input": "61125", "temp1_label": "Tctl"},
        "coretemp": {
            "temp1_input": "50000",
            "temp1_label": "Package id 0",
            "temp2_input": "1",
            "temp2_label": "Core 0",
        },
        "nvme": {"temp1_input": "40000"},
        "nct6775": {"fan2_input": "1234", "in0_input": "888"},
        "amdgpu": {"power1_average": "1", "power1_input": "15000000", "power1_label": "PPT"},
    }
    for index, (chip, files) in enumerate(chips.items()):
        write(
            device, {f"sys/class/hwmon/hwmon{index}/{name}": text for name, text in {"name": chip, **files}.items()}
        )
    assert read(sensors.hardware_monitors(str(device))) == {
        "k10temp Tctl temperature": pytest.approx(61.125),
        "coretemp Package id 0 temperature": 50,
        "nct6775 fan2": 1234,
        "amdgpu PPT power": 15,
    }


def test_throttling_is_counted_from_sample_to_sample(device: Path) -> None:
    def count(core: int, package: int) -> None:
        for cpu, more in ((0, 0), (1, core)):
            folder = f"{CPU}cpu{cpu}/thermal_throttle/"
            write(device, {folder + "core_throttle_count": str(5 + more)})
            write(device, {folder + "package_throttle_count": str(9 + package)})

    count(0, 0)
    source = sensors.Throttling(str(device))
    count(2, 1)
    assert read(source) == {"CPU core throttling": 2, "CPU package throttling": 1}
    assert read(source) == {"CPU core throttling": 0, "CPU package throttling": 0}


def test_energy_is_counted_beyond_the_range_of_its_counter(device: Path) -> None:
    def set_to(package: int, core: int) -> None:
        zone = "sys/class/powercap/intel-rapl:0"
        for folder, name, spent in ((zone, "package-0", package), (f"{zone}/../intel-rapl:0:0", "core", core)):
            write(device, {f"{folder}/name": name, f"{folder}/max_energy_range_uj": "10000000"})
            write(device, {f"{folder}/energy_uj": str(spent)})

    set_to(9_000_000, 1_000_000)
    source = sensors.energy_counters(str(device))
    assert read(source) == {"package-0 energy": 0, "package-0 core energy": 0}
    set_to(1_500_000, 1_250_000)
    assert read(source) == {"package-0 energy": pytest.approx(2.5), "package-0 core energy": pytest.approx(0.25)}
    assert {channel.unit for channel in source.channels} == {"J"}


def test_what_root_alone_may_read_is_a_note(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = device / "sys/class/powercap/intel-rapl:0"
    write(folder, {"name": "package-0", "max_energy_range_uj": "1", "energy_uj": "1"})

    def refuse(path: str) -> float:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(sensors, "number", refuse)
    source = sensors.energy_counters(str(device))
    assert source.channels == []
    assert source.notes == [f"RAPL: package-0 energy cannot be read ({folder}/energy_uj: Permission denied)"]


def test_load_of_others_is_without_what_measures_and_what_it_started(device: Path) -> None:
    """Of 1,000 ticks 500 are busy: 100 the benchmark's, 150 its children's, one of which has ended."""
    stat = "{} (trt) exec) R 1 {} 7 0 -1 0 0 0 0 0 {} 0 {} 0 20 0 1 0"
    write(device, {"proc/7/task/7/children": "8 9 ", "proc/8/stat": stat.format(8, 8, 10, 0)})
    source = sensors.Load(str(device), 7)
    assert source.read() == [None, None]
    write(
        device,
        {
            "proc/stat": "cpu  1400 0 600 8460 100 0 0 440 0 0\n",
            "proc/7/stat": stat.format(7, 1, 220, 100),
            "proc/8/stat": stat.format(8, 7, 60, 0),
        },
    )
    assert read(source) == {"load of other processes": pytest.approx(25), "time taken by the hypervisor": 4}
    assert source.read() == [None, None], "within a tick"


def test_memory(device: Path) -> None:
    assert read(sensors.Memory(str(device))) == {"memory in use": pytest.approx(512)}


@pytest.mark.parametrize("release", ["gpu", "ga10b"])
def test_a_jetsons_gpu_without_tegrastats(device: Path, release: str) -> None:
    folder = "sys/class/devfreq/17000000.gpu"
    write(device, {f"{folder}/device/of_node/name": release + "\0", f"{folder}/device/load": "437\n"})
    write(device, {f"{folder}/cur_freq": "1300500000\n"})
    write(device, {"sys/class/devfreq/2c60000.emc/device/of_node/name": "external-memory-controller\0"})
    assert read(sensors.jetson_gpu(str(device))) == {"GPU clock": 1300.5, "GPU load": pytest.approx(43.7)}


# --- NVIDIA ----------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for NVML, compiled."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    library = tmp_path / "lib" / "libnvidia-ml.so.1"
    library.parent.mkdir()
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, STANDINS / "nvml.c"], check=True)
    monkeypatch.setattr(nvml, "_LIBRARY", str(library))
    return library


def test_gpus_through_nvml(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVML_STANDIN_REASONS", "0x45")  # idle, the power cap, the hardware's thermal slowdown
    source = nvml.Gpus()
    first = read(source)
    assert {name: value for name, value in first.items() if name.startswith("GPU 1")} == {
        "GPU 1 clock": 1980,
        "GPU 1 memory clock": 3201,
        "GPU 1 temperature": 42,
        "GPU 1 power": pytest.approx(123.456),
        "GPU 1 energy": pytest.approx(5_000_000 + 2 * 12.345),
        "GPU 1 memory in use": 1000,
        "GPU 1 load": 87,
        "GPU 1 thermal throttling": 1,
        "GPU 1 power throttling": 1,
        "GPU 1 fan": 30,
    }
    assert len(first) == 20
    spent = read(source)["GPU 0 energy"]
    assert spent is not None
    assert spent - (first["GPU 0 energy"] or 0) == pytest.approx(12.345)
    monkeypatch.setenv("NVML_STANDIN_REASONS", "0x1")
    assert read(source)["GPU 0 power throttling"] == read(source)["GPU 0 thermal throttling"] == 0
    assert source.notes == []


def test_what_a_gpu_does_not_support_is_not_there(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVML_STANDIN_UNSUPPORTED", "nvmlDeviceGetFanSpeed nvmlDeviceGetTotalEnergyConsumption")
    source = nvml.Gpus()
    assert len(source.channels) == 16
    assert source.notes == []
    monkeypatch.setenv("NVML_STANDIN_UNSUPPORTED", "nvmlDeviceGetPowerUsage")  # the GPU has fallen off the bus, say
    assert read(source)["GPU 0 power"] is None
    assert read(source)["GPU 0 clock"] == 1980


def test_nvml_without_its_driver_is_a_note(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVML_STANDIN_INIT", "9")
    source = nvml.Gpus()
    assert source.channels == []
    assert source.notes == ["NVML: Driver Not Loaded"]


def test_without_nvml_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_LIBRARY", "libnvidia-ml.so.none")
    assert nvml.Gpus().channels == nvml.Gpus().notes == nvml.Gpus().read() == []


Board = Callable[[str], None]


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    """Put a stand-in for tegrastats in front of PATH."""

    def play(name: str) -> None:
        programs = tmp_path / "programs"
        programs.mkdir()
        start = f'#!/bin/sh\nexec {sys.executable} -SE {STANDINS}/tegrastats "$@"\n'
        (programs / "tegrastats").write_text(start)
        (programs / "tegrastats").chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.setenv("TEGRASTATS_STANDIN", name)

    return play


LINES: dict[str, dict[str, float]] = {
    "orin-nano": {
        "memory load": 15,
        "memory clock": 204,
        "GPU load": 0,
        "GPU clock": 305,
        "cpu temperature": 48.562,
        "soc2 temperature": 46.593,
        "gpu temperature": 49.625,
        "tj temperature": 49.312,
        "VDD_IN power": 5.251,
        "VDD_CPU_GPU_CV power": 0.512,
        "VDD_SOC power": 2.72,
    },
    "agx-orin": {
        "memory load": 0,
        "GPU load": 0,
        "CPU temperature": 44.562,
        "Tboard temperature": 32,
        "tj temperature": 44.343,
        "VDD_GPU_SOC power": 2.34,
        "VDD_CPU_CV power": 0.39,
        "VIN_SYS_5V0 power": 4.025,
    },
    "thor": {
        "memory clock": 4266,
        "GPU clock": 1575,
        "cpu temperature": 49.75,
        "gpu temperature": 51.218,
        "VDD_GPU power": 6.33,
        "VIN power": 28.906,
    },
}


@pytest.mark.parametrize("name", LINES)
def test_tegrastats_of_each_board(name: str, board: Board, device: Path) -> None:
    board(name)
    (source,) = (s for s in telemetry.available(str(device), 10, 7) if isinstance(s, tegrastats.Tegrastats))
    try:
        channels = [channel.name for channel in source.channels]
        assert channels == list(LINES[name])
        said = read(source)
        assert {key: said[key] for key in said if key != "GPU load"} == {
            key: pytest.approx(value) for key, value in LINES[name].items() if key != "GPU load"
        }
        deadline = time.monotonic() + 20
        while "GPU load" in said and read(source)["GPU load"] == said["GPU load"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        source._process.kill()
        source._process.wait()
        source.read()
        assert set(source.read()) == {None}, "what it said before it ended is no news"
    finally:
        source.close()


def test_tegrastats_stands_for_what_the_kernel_tells_of_the_same(board: Board, device: Path) -> None:
    write(device, {"sys/class/thermal/thermal_zone0/type": "gpu", "sys/class/thermal/thermal_zone0/temp": "1000"})
    assert [
        c.source for s in telemetry.available(str(device), 10, 7) for c in s.channels if c.kind == "temperature"
    ] == ["thermal zone"]
    board("thor")
    sources = telemetry.available(str(device), 10, 7)
    for source in sources:
        source.close()
    found = {c.source for s in sources for c in s.channels if c.kind == "temperature"}
    assert found == {"tegrastats"}


@pytest.mark.parametrize(
    ("name", "said"),
    [("broken", "tegrastats: this is no line of it"), ("silent", "it says nothing")],
)
def test_a_tegrastats_that_tells_nothing_is_a_note(
    name: str, said: str, board: Board, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board(name)
    write(device, {"sys/class/thermal/thermal_zone0/type": "gpu", "sys/class/thermal/thermal_zone0/temp": "1000"})
    sources = telemetry.available(str(device), 10, 7)
    assert ["tegrastats: " + said] == [note for source in sources for note in source.notes if "tegrastats" in note]
    assert [c.source for s in sources for c in s.channels if c.kind == "temperature"] == ["thermal zone"]
    for source in sources:
        source.close()


# --- the process -----------------------------------------------------------------------------------------------


def the_samplers(folder: Path) -> list[int]:
    """Return the sampling processes that write into a folder, and what they have started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and (str(folder).encode() in line and b"telemetry.sample" in line):
            found.append(int(process.name))
    return found


def gone(*pids: int) -> bool:
    """Tell whether processes end within 20 seconds."""
    deadline = time.monotonic() + 20
    left = set(pids)
    while left and time.monotonic() < deadline:
        for pid in list(left):
            try:
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    left.discard(pid)
            except OSError:
                left.discard(pid)
        time.sleep(0.02)
    return not left


def children(pid: int) -> list[int]:
    return [int(c) for path in Path(f"/proc/{pid}/task").glob("*/children") for c in path.read_text().split()]


def test_this_machine_is_sampled(tmp_path: Path) -> None:
    before = time.monotonic_ns()
    with telemetry.sampled(str(tmp_path / "telemetry.json"), 20) as notes:
        (sampler,) = the_samplers(tmp_path)
        time.sleep(0.5)
        assert not (tmp_path / "telemetry.json").exists()
    after = time.monotonic_ns()
    assert notes == []
    assert gone(sampler)
    told: dict[str, Any] = json.loads((tmp_path / "telemetry.json").read_text())
    assert list(tmp_path.iterdir()) == [tmp_path / "telemetry.json"]
    assert told["interval_ms"] == 20
    times = told["times_ns"]
    assert 3 < len(times) < 30
    assert before < times[0] < times[-1] < after
    assert all(earlier < later for earlier, later in itertools.pairwise(times))
    channels = {channel["name"]: channel for channel in told["channels"]}
    assert all(set(c) == {"name", "kind", "unit", "source", "values"} for c in told["channels"])
    assert all(len(channel["values"]) == len(times) for channel in told["channels"])
    assert all(0 < value < 1e9 for value in channels["memory in use"]["values"])
    others = [value for value in channels["load of other processes"]["values"] if value is not None]
    assert others
    assert all(0 <= value <= 100 for value in others)


def test_the_sampler_keeps_off_the_measured_cpus(tmp_path: Path) -> None:
    mine = os.sched_getaffinity(0)
    if len(mine) == 1:
        pytest.skip("there is one CPU")
    for avoid in ([min(mine)], sorted(mine)):
        with telemetry.sampled(str(tmp_path / "telemetry.json"), avoid=avoid):
            (sampler,) = the_samplers(tmp_path)
            assert os.sched_getaffinity(sampler) == (mine - set(avoid) or mine)
            assert os.getpriority(os.PRIO_PROCESS, sampler) == min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)
    assert os.sched_getaffinity(0) == mine


def test_a_whole_jetson_in_the_zipapp(board: Board, driver: Path, device: Path, tmp_path: Path) -> None:
    """The agent as it travels, killed while it measures: the sampler ends, and tegrastats with it."""
    board("orin-nano")
    (tmp_path / "agent.pyz").write_bytes(pack())
    program = (
        f"import sys, time; sys.path.insert(0, 'agent.pyz'); from {PACKAGE} import telemetry\n"
        f"with telemetry.sampled('telemetry.json', 10, root={str(device)!r}):\n"
        "    print('measuring', flush=True)\n"
        "    time.sleep(float(sys.argv[1]))\n"
    )

    def start(seconds: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, seconds],
            cwd=tmp_path,
            env=os.environ | {"LD_LIBRARY_PATH": str(driver.parent)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        assert process.stdout.readline() == "measuring\n"
        return process

    with start("0.2") as agent:
        agent.wait()
    told = json.loads((tmp_path / "telemetry.json").read_text())
    assert {channel["source"] for channel in told["channels"]} >= {"tegrastats", "NVML", "/proc/stat"}
    (tmp_path / "telemetry.json").unlink()
    with start("60") as agent:
        (sampler,) = children(agent.pid)
        (stats,) = children(sampler)
        agent.send_signal(signal.SIGKILL)
        assert gone(sampler, stats)


def test_an_error_in_the_block_ends_it_too(tmp_path: Path) -> None:
    samplers = []

    def interrupted() -> None:
        with telemetry.sampled(str(tmp_path / "telemetry.json")):
            samplers.extend(the_samplers(tmp_path))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(samplers) == 1
    assert gone(*samplers)
    assert len(json.loads((tmp_path / "telemetry.json").read_text())["times_ns"]) >= 2


def test_what_ends_the_sampler_is_said_and_loses_nothing_else(tmp_path: Path) -> None:
    with telemetry.sampled(str(tmp_path / "telemetry.json")) as notes:
        (sampler,) = the_samplers(tmp_path)
        os.kill(sampler, signal.SIGKILL)
        assert gone(sampler)
    assert notes == ["telemetry broke off (-9): no reason"]
    with telemetry.sampled(str(tmp_path / "no folder" / "telemetry.json")) as notes:
        pass
    assert notes[0].startswith("telemetry broke off (1): FileNotFoundError")
    assert list(tmp_path.iterdir()) == []


def test_a_sampler_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_SECONDS", 0.5)
    monkeypatch.setattr(telemetry, "_SAMPLER", "import time; 'telemetry.sample'; time.sleep(600)")
    with telemetry.sampled(str(tmp_path / "telemetry.json")) as notes:
        (sampler,) = the_samplers(tmp_path)
    assert notes == ["telemetry was ended, since it did not end by itself"]
    assert gone(sampler)


def test_a_source_that_fails_later_leaves_gaps_and_not_the_others(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sensors.Load(str(device), 7)
    (device / "proc/stat").write_text("cpu  none of it\n")
    assert telemetry._values(source) == [None, None]
