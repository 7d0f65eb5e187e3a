"""The measurement on the device: its loops, the warm-up, the conditions, and the agent's verbs as a whole."""

from __future__ import annotations

import gc
import itertools
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import nvidia
from tests.integration import measuring
from tests.nvidia import STANDINS
from toolkit.agent import compare, conditions, engine, scenarios, warmup
from toolkit.delivery.release import Release
from toolkit.devices.agent import Agent
from toolkit.devices.local import LocalDevice
from toolkit.errors import StageError

MS = 1_000_000


class Clock:
    """A clock that only queries and sleeping move, nanoseconds."""

    def __init__(self) -> None:
        self.now = 10**9
        self.slept = 0.0

    def monotonic_ns(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.now += round(seconds * 1e9)

    def queries(self, times: Iterator[int]) -> Iterator[scenarios.Query]:
        """Return queries that take so many nanoseconds each."""

        def query() -> None:
            self.now += next(times)

        return itertools.repeat(query)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (scenarios, warmup, compare):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic_ns=made.monotonic_ns, sleep=made.sleep))
    return made


# the loops


@pytest.mark.parametrize(
    ("room", "least", "until_ms", "sent"),
    [(100, 1, 9, 4), (100, 7, 9, 7), (100, 1, 0, 1), (5, 50, 900, 5)],
    ids=["time", "least", "once", "full"],
)
def test_a_burst_ends_when_it_should(clock: Clock, room: int, least: int, until_ms: int, sent: int) -> None:
    taken = scenarios.buffer(room)
    times = [MS, 2 * MS, 3 * MS, 4 * MS] + [MS] * 96
    assert scenarios.burst(clock.queries(iter(times)), taken, least, clock.now + until_ms * MS) == sent
    assert list(taken[:sent]) == times[:sent]
    assert not any(taken[sent:])


def test_queries_rotate_through_the_images() -> None:
    seen: list[int] = []

    class Session:
        def prepare(self, images: np.ndarray) -> Callable[[], None]:
            return lambda: seen.extend(images[:, 0, 0, 0])

    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 4, 4), np.uint8)
    pool = scenarios.rotated(images)
    single = {"name": "SingleStream", "duration_ms": 0, "queries": 25}
    entry, taken = scenarios.run(single, scenarios.prepared(Session(), pool, 1))
    assert entry["queries"] == len(taken) == 25
    assert seen == [*range(10), *range(10), *range(5)]
    seen.clear()
    entry, taken = scenarios.run(
        {"name": "Offline", "batch": 4, "duration_ms": 0}, scenarios.prepared(Session(), pool, 4)
    )
    assert entry["queries"] == len(taken) == 3
    assert seen == list(range(8)) * 2 + list(range(4)), "two that do not count, and three that do"
    seen.clear()
    (query,) = scenarios.prepared(Session(), pool, 16)
    query()
    assert seen == [*range(10), *range(6)]


def test_large_images_are_fewer() -> None:
    assert len(scenarios.rotated(np.zeros((1000, 3, 32, 32), np.uint8))) == 256
    assert len(scenarios.rotated(np.zeros((300, 3, 224, 224), np.uint8))) == 111
    assert len(scenarios.rotated(np.zeros((2, 3, 4000, 4000), np.uint8))) == 1


@pytest.mark.parametrize(
    ("times", "sent", "late"),
    [
        ([10] * 9, 9, 0),
        ([33] * 9, 9, 8),  # the one before ends when the next is due
        ([40, 10, 10, 10, 10, 10, 10, 10, 10], 9, 1),
        ([70, 10, 10, 10, 10, 10, 10, 10, 10], 9, 2),  # it catches up
        ([100] * 9, 3, 2),
    ],
    ids=["in time", "at its limit", "one", "two", "never"],
)
def test_a_query_that_cannot_begin_on_time_is_late(clock: Clock, times: list[int], sent: int, late: int) -> None:
    taken = scenarios.buffer(9)
    began = clock.now
    assert scenarios.paced(clock.queries(t * MS for t in times), taken, 33 * MS) == (sent, late)
    assert list(taken[:sent]) == [t * MS for t in times[:sent]], "waiting is not part of a query"
    assert clock.now - began == round(clock.slept * 1e9) + sum(taken)
    assert clock.now - began <= 9 * 33 * MS + 10 * MS


def test_a_duty_cycle_settles_before_it_counts(clock: Clock) -> None:
    times = iter([5 * MS] * 10 + [1 * MS] * 1000)
    order = {"name": "DutyCycle", "period_ms": 20, "duration_ms": 1000}
    entry, taken = scenarios.run(order, [next(clock.queries(times))])
    assert (entry["queries"], entry["late"], entry["period_ms"]) == (50, 0, 20)
    assert set(taken) == {MS}
    assert entry["ended_ns"] - entry["began_ns"] == 49 * 20 * MS + MS


def test_the_overhead_is_that_of_the_loop() -> None:
    found = scenarios.overhead()
    assert 0 < found["p50"] <= found["p99"]


# the warm-up


def noise(seed: int, level: float) -> Iterator[int]:
    chance = random.Random(seed)
    return (round(MS * (1 + level * chance.random())) for _ in itertools.count())


@pytest.mark.parametrize(
    ("times", "between"),
    [
        (itertools.repeat(MS), (250, 252)),
        (noise(1, 0.3), (250, 500)),
        ((round(MS * (1 + 5 * 0.99**i)) for i in itertools.count()), (800, 3000)),
        (itertools.chain([2 * MS] * 100, itertools.repeat(MS)), (350, 2500)),
        (itertools.repeat(40 * MS), (1920, 3000)),
    ],
    ids=["constant", "noise", "settling", "step", "slow"],
)
def test_the_warm_up_ends_when_the_times_are_steady(
    clock: Clock, times: Iterator[int], between: tuple[int, int]
) -> None:
    found = warmup.until_steady(clock.queries(times), 10_000)
    assert found["steady"]
    assert between[0] <= found["ms"] <= between[1]


@pytest.mark.parametrize(
    "times",
    [
        (round(MS * (1 + i / 2000)) for i in itertools.count()),
        (round(MS * max(0.1, 1 - i / 5000)) for i in itertools.count()),
        itertools.repeat(400 * MS),
    ],
    ids=["slower and slower", "faster and faster", "too few"],
)
def test_a_warm_up_that_gets_nowhere_is_bounded_and_says_so(clock: Clock, times: Iterator[int]) -> None:
    found = warmup.until_steady(clock.queries(times), 2000)
    assert not found["steady"]
    assert 2000 <= found["ms"] <= 2400
    assert found["queries"] >= 5


def test_no_time_to_warm_up_is_not_steady() -> None:
    assert warmup.until_steady(iter([]), 0) == {"steady": False, "queries": 0, "ms": pytest.approx(0, abs=100)}


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_seldom_taken_for_a_trend(seed: int) -> None:
    chance = random.Random(seed)
    series = [[chance.gauss(1, 0.2) for _ in range(240)] for _ in range(100)]
    assert sum(warmup.is_steady([round(MS * value) for value in one]) for one in series) >= 90


# the conditions


def test_conditions_are_set_back() -> None:
    def state() -> Any:
        return os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0), gc.isenabled(), gc.get_freeze_count()

    before = state()
    with conditions.quiet(1) as held:
        cpus, nice, collecting, frozen = state()
        assert (collecting, held["garbage_collection"]) == (False, "off")
        assert frozen > 0
        assert nice == (before[1] if held["nice"] is None else held["nice"])
        assert cpus == (before[0] if held["affinity"] is None else set(held["affinity"]))
        assert (held["affinity"] is None) == (len(before[0]) == 1)
        assert held["memory_locked"] == ("VmLck:	       0 kB" not in Path("/proc/self/status").read_text())
    assert state() == before
    assert "VmLck:	       0 kB" in Path("/proc/self/status").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may do nothing")
def test_what_is_not_allowed_is_said() -> None:
    program = (
        "import json, os, resource; from toolkit.agent import conditions;"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0)); os.setuid(65534);"
        "held = conditions.quiet(999).__enter__(); print(json.dumps(held))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    held = json.loads(done.stdout)
    assert (held["affinity"], held["nice"], held["memory_locked"]) == (None, None, False)
    for reason in ("not bound to CPUs", "priority not raised", "memory not locked"):
        assert any(reason in note for note in held["notes"])


@pytest.mark.parametrize(
    ("threads", "cores", "fast", "chosen"),
    [
        (1, {}, {}, [3]),
        (2, {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, {}, [1, 3]),
        (3, {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, {}, [1, 2, 3]),
        (2, {}, {0: 2000, 1: 2000, 2: 1000, 3: 1000}, [0, 1]),
        (4, {}, {}, None),
        (None, {}, {}, None),
    ],
    ids=["last", "cores", "shared", "fast", "all", "gpu"],
)
def test_it_takes_the_cpus_that_suit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: int | None,
    cores: dict[int, str],
    fast: dict[int, int],
    chosen: list[int] | None,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    for name, values in (("topology/thread_siblings_list", cores), ("cpufreq/cpuinfo_max_freq", fast)):
        for cpu, value in values.items():
            path = tmp_path / f"devices/system/cpu/cpu{cpu}/{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")
    assert conditions.own_cpus(threads, str(tmp_path)) == chosen


# in turns


def test_both_sides_meet_the_same_device(clock: Clock) -> None:
    """The device slows down by half while it measures; a and b stay as far apart as they are."""
    began = clock.now

    def engine_of(cost: float) -> Any:
        def query() -> None:
            clock.now += round(cost * MS * (1 + (clock.now - began) / (4000 * MS)))

        return [query]

    taken, bursts = compare.in_turns((engine_of(1.0), engine_of(1.1)), 2000, None, random.Random(3))
    sides = bursts[:, 0]
    assert len(bursts) % 4 == 0
    groups = {tuple(group) for group in sides.reshape(-1, 4).tolist()}
    assert groups == {(0, 1, 1, 0), (1, 0, 0, 1)}
    for side in (0, 1):
        own = bursts[sides == side]
        assert own[:, 1].tolist() == [0, *np.cumsum(own[:, 2])[:-1]]
        assert own[:, 2].sum() == len(taken[side])
    assert np.median(taken[1]) / np.median(taken[0]) == pytest.approx(1.1, rel=0.01)


def test_slow_engines_and_duty_cycles_take_turns_too(clock: Clock) -> None:
    slow = [next(clock.queries(itertools.repeat(50 * MS)))]
    taken, bursts = compare.in_turns((slow, slow), 2000, None, random.Random(0))
    assert set(bursts[:, 2]) == {5}
    taken, bursts = compare.in_turns((slow, slow), 5000, 100, random.Random(0))
    assert set(bursts[:, 2]) == {10}
    assert [set(times) for times in taken] == [{50 * MS}, {50 * MS}]


# the verbs


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalDevice, Release]:
    folder = tmp_path_factory.mktemp("measured")
    device = LocalDevice(folder / "device")
    return device, measuring.deliver(device, folder)


def order(device: LocalDevice, release: Release, out: Path, **changes: Any) -> dict[str, Any]:
    folder = f"{device.root}/releases/{release.id}"
    return {"root": device.root, "release": folder, "out": str(out), **measuring.SETTINGS, **changes}


def test_a_round(delivered: tuple[LocalDevice, Release], tmp_path: Path) -> None:
    device, release = delivered
    found = Agent(device).ask("bench", order(device, release, tmp_path))
    names = [(entry["name"], entry["batch"], entry["file"]) for entry in found["scenarios"]]
    assert names == [
        ("SingleStream", 1, "SingleStream.npy"),
        ("Offline", 4, "Offline-4.npy"),
        ("DutyCycle", 1, "DutyCycle.npy"),
    ]
    for entry in found["scenarios"]:
        times = np.load(tmp_path / entry["file"])
        assert times.dtype == np.int64
        assert len(times) == entry["queries"] >= 3
        assert 0 < times.sum() <= entry["ended_ns"] - entry["began_ns"]
        assert entry["cpu"]["cpu_ms"] > 0
    assert len(np.load(tmp_path / "SingleStream.npy")) >= 20
    assert found["scenarios"][2]["queries"] + found["scenarios"][2]["late"] >= 10
    assert found["warmup"]["queries"] > 0
    assert 0 < found["overhead_ns"]["p50"] <= found["overhead_ns"]["p99"]
    assert min(found["load_ms"], found["first_ms"]) > 0
    assert 10e6 < found["peak_memory_bytes"] < 400e6
    assert found["conditions"]["garbage_collection"] == "off"
    assert (found["ran"]["provider"], found["ran"]["threads"]) == ("CPUExecutionProvider", 1)
    logits = np.load(tmp_path / "logits.npy")
    assert (logits.dtype, logits.shape) == (np.float32, (64, 2))
    assert logits.argmax(1).tolist() == [0, 1] * 32
    assert found["images"] == 64
    assert found["not_measured"] == {}
    sampled = json.loads((tmp_path / found["telemetry"]).read_text())
    assert sampled["times_ns"][0] <= found["scenarios"][0]["began_ns"]
    assert sampled["times_ns"][-1] >= found["scenarios"][-1]["ended_ns"]
    assert found["profile"] is None


def test_layers_are_timed_and_what_ran_is_told(delivered: tuple[LocalDevice, Release], tmp_path: Path) -> None:
    device, release = delivered
    found = Agent(device).ask("bench", order(device, release, tmp_path, scenarios=[], profile=True))
    assert {"Cast", "ReduceMean", "Concat"} <= {layer["type"] for layer in found["profile"]}
    assert found["ran"] == {"provider": "CPUExecutionProvider", "threads": 1, "precision": {}, "fallback": []}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="ONNX Runtime computes in fp16 on some ARM processors")
@pytest.mark.parametrize("asked", ["fp32", "fp16", "int8"])
def test_another_precision_than_asked_for_is_refused(tmp_path: Path, asked: str) -> None:
    """Of fp16, and of int8 as TensorRT has it spelled, ONNX Runtime makes fp32 and says nothing."""
    device = LocalDevice(tmp_path / "device")
    release = tmp_path / "release"
    (release / "evaluation").mkdir(parents=True)
    model = nvidia.graph(tmp_path / "model.onnx", asked)
    agent = Agent(device)
    build = nvidia.request(release, model, asked) | {"runtime": "onnxruntime", "threads": 1, "root": device.root}
    agent.ask("build", build)
    np.save(release / "evaluation" / "images.npy", nvidia.images(20))
    request = measuring.SETTINGS | {"root": device.root, "release": str(release), "out": str(tmp_path / "out")}
    request |= {"scenarios": [], "profile": True}
    if asked == "fp32":
        assert agent.ask("bench", request)["ran"]["precision"] == {"fp32": 2}
    else:
        with pytest.raises(StageError, match=f"asked for {asked}, and .* otherwise: 2 in fp32") as error:
            agent.ask("bench", request)
        assert "--precision" in str(error.value.hint)


def test_without_evaluation_there_are_no_logits(delivered: tuple[LocalDevice, Release], tmp_path: Path) -> None:
    device, release = delivered
    Agent(device).ask("bench", order(device, release, tmp_path, evaluate=False, scenarios=[]))
    assert [path.name for path in tmp_path.iterdir()] == ["telemetry.json"]


@pytest.mark.parametrize("period", [None, 2])
def test_two_releases_in_one_process(
    delivered: tuple[LocalDevice, Release], tmp_path: Path, period: int | None
) -> None:
    device, release = delivered
    asked = order(device, release, tmp_path) | {"duration_ms": 200, "period_ms": period, "seed": 1}
    found = Agent(device).ask("compare", asked | {"releases": [asked["release"]] * 2})
    bursts = np.load(tmp_path / "bursts.npy")
    assert (bursts.dtype, bursts.shape) == (np.int64, (found["bursts"], 3))
    for side, name in enumerate("ab"):
        times = np.load(tmp_path / f"{name}.npy")
        assert len(times) == found["queries"][side] == bursts[bursts[:, 0] == side][:, 2].sum() > 0
        assert (times > 0).all()
        assert found["load_ms"][side] > 0
        assert found["warmup"][side]["queries"] > 0


def test_a_prepared_query_computes_what_a_run_computes(delivered: tuple[LocalDevice, Release]) -> None:
    device, release = delivered
    folder = f"{device.root}/releases/{release.id}"
    images = np.load(f"{folder}/evaluation/images.npy")
    session = engine.load(folder, device.root)
    first, second = session.prepare(images[:3]), session.prepare(images[3:4])
    kept = first()
    np.testing.assert_array_equal(kept, session.run(images[:3]))
    np.testing.assert_array_equal(second(), session.run(images[3:4]))
    kept[:] = 0
    assert first() is kept, "it computes into memory that is there"
    np.testing.assert_array_equal(kept, session.run(images[:3]))


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Agent, dict[str, Any]]:
    """A release of a plan on a device that has trtexec alone."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{nvidia.A100['name']}, 8.0, 40960'\n")
    tool.chmod(0o755)
    for name, value in nvidia.environment("10.3", nvidia.A100).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRTEXEC", str(STANDINS / "trtexec"))
    monkeypatch.setenv("TRTEXEC_STANDIN", "10.3")
    for folder in (Path(sys.executable).parent, tool.parent):
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    device = LocalDevice(tmp_path / "device")
    agent = Agent(device)
    release = tmp_path / "release"
    (release / "evaluation").mkdir(parents=True)
    model = nvidia.graph(tmp_path / "model.onnx", "fp16")
    agent.ask("build", nvidia.request(release, model, "fp16") | {"root": device.root})
    np.save(release / "evaluation" / "images.npy", nvidia.images(20))
    asked = {"root": device.root, "release": str(release), "out": str(tmp_path / "out"), **measuring.SETTINGS}
    return agent, asked


def test_trtexec_measures_what_it_can(plan: tuple[Agent, dict[str, Any]]) -> None:
    agent, asked = plan
    asked["scenarios"] = [*asked["scenarios"], {"name": "Offline", "batch": 64, "duration_ms": 50}]
    asked["profile"] = True
    found = agent.ask("bench", asked)
    assert [entry["file"] for entry in found["scenarios"]] == ["SingleStream.npy", "Offline-4.npy"]
    for entry in found["scenarios"]:
        times = np.load(Path(asked["out"], entry["file"]))
        assert (times.dtype, len(times)) == (np.int64, entry["queries"])
    assert set(found["not_measured"]) == {"accuracy", "peak memory", "DutyCycle", "Offline-64"}
    assert found["overhead_ns"] is None
    assert [layer["nodes"] for layer in found["profile"]]
    assert found["telemetry"] == "telemetry.json"
    assert found["settings"]["tool"] == "trtexec"
    assert found["ran"]["precision"] == {"fp16": 2}


def test_trtexec_cannot_compare(plan: tuple[Agent, dict[str, Any]]) -> None:
    agent, asked = plan
    asked |= {"releases": [asked["release"]] * 2, "duration_ms": 50, "period_ms": None, "seed": 0}
    with pytest.raises(StageError, match="share one process only where Python runs them") as error:
        agent.ask("compare", asked)
    assert "cuda-python" in str(error.value.hint)
