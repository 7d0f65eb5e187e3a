"""What was not steady in a measurement: on series and telemetry whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import signal

from toolkit.bench import stability
from toolkit.bench.series import Channel, Run

N = 2000
SECONDS = 2
TIME = np.arange(N) / N
Make = Callable[[np.random.Generator], NDArray[np.float64]]


def found(series: list[NDArray[Any]], **about: Any) -> list[dict[str, Any]]:
    entry = {"began_ns": 0, "ended_ns": SECONDS * 10**9, "cpu": {"involuntary_switches": about.pop("switches", 0)}}
    channels = about.pop("channels", [])
    runs = [Run(entry, part.astype(np.int64), channels) for part in series]
    told = stability.judge(runs, [about for _ in runs])
    assert told["stable"] == (not told["findings"])
    for finding in told["findings"]:
        assert finding["text"]
        assert finding["hint"]
    return list(told["findings"])


def noise(random: np.random.Generator, spread: float = 0.05, n: int = N) -> NDArray[np.float64]:
    return np.exp(spread * random.normal(size=n)) * 1e6


STEADY: dict[str, Make] = {
    "normal": noise,
    "few": lambda random: noise(random, n=200),
    "skewed": lambda random: noise(random, 0.5),
    "heavy tail": lambda random: 1e6 * (1 + 0.05 * random.pareto(1.5, size=N)),
    "uniform": lambda random: 1e6 * (1 + 0.2 * random.random(N)),
    "a few far off": lambda random: np.where(random.random(N) < 0.03, 1.5, 1) * noise(random, 0.02),
    "autocorrelated": lambda random: np.exp(0.05 * signal.lfilter([0.44], [1, -0.9], random.normal(size=N))) * 1e6,
    "a coarse clock": lambda random: np.round(noise(random, 0.02), -4),
    "constant": lambda random: np.full(N, 1e6),
}


@pytest.mark.parametrize("kind", STEADY)
def test_what_is_steady_is_called_so(kind: str) -> None:
    random = np.random.default_rng(2)
    called = [finding["what"] for _ in range(100) for finding in found([STEADY[kind](random)])]
    assert len(called) <= 3, called


UNSTEADY: dict[str, tuple[Make, str, str]] = {
    "rising": (lambda random: noise(random) * (1 + 0.05 * TIME), "drift", "higher from begin to end"),
    "falling": (lambda random: noise(random) * (1 - 0.05 * TIME), "drift", "lower from begin to end"),
    "a step": (lambda random: noise(random) * (1 + 0.1 * (TIME > 0.3)), "drift", "at once, 30% into round 1"),
    "two modes": (
        lambda random: np.where(random.random(N) < 0.2, 1.1, 1) * noise(random, 0.02),
        "bimodal",
        "two modes: ",
    ),
}


@pytest.mark.parametrize("kind", UNSTEADY)
def test_what_is_not_steady_is_found_and_named(kind: str) -> None:
    make, what, words = UNSTEADY[kind]
    random = np.random.default_rng(4)
    named = 0
    for _ in range(20):
        findings = found([make(random)])
        named += [finding["what"] for finding in findings] == [what] and words in findings[0]["text"]
    assert named >= 18


def test_the_two_modes_are_told_with_their_weight() -> None:
    random = np.random.default_rng(4)
    (finding,) = found([np.where(random.random(20_000) < 0.3, 1.2, 1) * noise(random, 0.02, 20_000)])
    assert finding["text"] == "latency has two modes: 1.000 ms (70% of the queries) and 1.200 ms"


def test_rounds_that_differ_are_found() -> None:
    random = np.random.default_rng(4)
    (finding,) = found([noise(random, 0.01), noise(random, 0.01) * 1.07, noise(random, 0.01)])
    assert "the rounds' medians lie between 1.000 and 1.07" in finding["text"]


def test_the_hint_takes_what_is_set_already_into_account() -> None:
    rising = [noise(np.random.default_rng(4)) * (1 + 0.1 * TIME)]
    assert "'clocks: locked'" in found(rising)[0]["hint"]
    locked = {"tuning": {"set": {"GPU clocks": "locked at 1,980 MHz"}, "found": {}}}
    assert "'power_mode'" in found(rising, **locked)[0]["hint"]
    falling = [noise(np.random.default_rng(4)) * (1 - 0.1 * TIME)]
    assert "'benchmark.warmup'" in found(falling)[0]["hint"]


STEADY_SERIES = [noise(np.random.default_rng(8))]


def channel(name: str, kind: str, values: list[float], source: str = "cpufreq") -> Channel:
    return Channel(name, kind, "", source, np.arange(len(values)) * 100_000_000, np.array(values, np.float64))


def test_clocks_that_change_are_found_where_it_ran() -> None:
    channels = [
        channel("cpu0 clock", "clock", [800, 3000] * 10),
        channel("cpu1 clock", "clock", [3000, 3010] * 10),
    ]
    assert not found(STEADY_SERIES, channels=channels), (
        "the fastest one is steady, and a CPU that sleeps does not count"
    )
    assert not found(STEADY_SERIES, channels=channels, conditions={"affinity": [1]})
    (finding,) = found(STEADY_SERIES, channels=channels, conditions={"affinity": [0]})
    assert finding["what"] == "clocks"
    assert finding["text"] == "cpu0 clock went between 800 and 3,000 MHz while it was measured"
    (finding,) = found(STEADY_SERIES, channels=[channel("GPU clock", "clock", [900, 1300] * 10, "tegrastats")])
    assert finding["text"].startswith("GPU clock went between 900 and 1,300 MHz")


def test_throttling_is_found() -> None:
    quiet = channel("GPU thermal throttling", "throttle", [0.0] * 20, "NVML")
    assert not found(STEADY_SERIES, channels=[quiet])
    hot = channel("GPU thermal throttling", "throttle", [0.0] * 19 + [1.0], "NVML")
    tuning = {"set": {"power mode": "MAXN"}, "found": {}}
    (finding,) = found(STEADY_SERIES, channels=[hot], tuning=tuning)
    assert finding["what"] == "throttling"
    assert "GPU thermal throttling" in finding["text"]
    assert "than MAXN" in finding["hint"]


@pytest.mark.parametrize(
    ("name", "kind", "source", "percent", "words"),
    [
        ("load of other processes", "load", "/proc/stat", 25.0, "other programs took 25 %"),
        ("time taken by the hypervisor", "steal", "/proc/stat", 3.0, "another virtual machine took 3 %"),
        ("GPU load", "load", "NVML", 95.0, None),
        ("load of other processes", "load", "/proc/stat", 2.0, None),
    ],
)
def test_noisy_neighbours_are_found(name: str, kind: str, source: str, percent: float, words: str | None) -> None:
    findings = found(STEADY_SERIES, channels=[channel(name, kind, [percent] * 20, source)])
    assert [finding["what"] for finding in findings] == (["noise"] if words else [])
    assert not words or words in findings[0]["text"]


def test_interruptions_count_when_p99_speaks_of_them() -> None:
    assert not found(STEADY_SERIES, switches=15)
    (finding,) = found(STEADY_SERIES, switches=40)
    assert finding["text"] == "other programs interrupted it 40 times in 2.0 s, 2.0% of the queries"


def test_a_warm_up_that_never_became_steady_is_found() -> None:
    steady = {"warmup": {"steady": True, "queries": 100, "ms": 300.0}}
    assert not found(STEADY_SERIES, **steady)
    (finding,) = found(STEADY_SERIES, warmup={"steady": False, "queries": 9000, "ms": 10_000.0})
    assert finding["what"] == "unsteady warm-up"
    assert finding["text"] == "latency was not steady after 10.0 s of warm-up (1 of 1 rounds)"
    assert "benchmark.warmup" in finding["hint"]


def test_a_handful_of_queries_says_nothing_of_its_course() -> None:
    assert not found([np.array([1e6, 2e6, 3e6, math.pi * 1e6])])
