"""Figures and intervals: against SciPy, against MLPerf's published counts, and on series whose truth is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import signal, stats

from toolkit.bench import distributions, early_stopping, intervals, statistics

Rounds = list[NDArray[np.int64]]


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("freedom", [1, 1.5, 2, 4.7, 19, 100, 9999, 1e6])
def test_t_quantile(freedom: float, confidence: float) -> None:
    expected = stats.t.ppf((1 + confidence) / 2, freedom)
    assert distributions.t_quantile(confidence, freedom) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("n", "p"), [(5, 0.5), (64, 0.1), (400, 0.99), (1_000_000, 0.9), (10_000_000, 0.001)])
def test_binomial_cdf(n: int, p: float) -> None:
    first, found = distributions.binomial_cdf(n, p)
    expected = stats.binom.cdf(np.arange(first, first + len(found)), n, p)
    assert found == pytest.approx(expected, abs=1e-9)
    assert stats.binom.cdf(first - 1, n, p) < 1e-12
    assert expected[-1] > 1 - 1e-12


@pytest.mark.parametrize(("percentile", "needed"), [(50, 6), (90, 36), (99, 368), (99.9, 3688)])
def test_samples_needed(percentile: float, needed: int) -> None:
    p = percentile / 100
    assert distributions.samples_needed(p, 0.95) == needed
    assert distributions.order_statistics(needed, p, 0.95) is not None
    assert distributions.order_statistics(needed - 1, p, 0.95) is None


@pytest.mark.parametrize("n", [368, 1000, 54_321])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_order_statistics_are_the_narrowest_that_the_binomial_allows(n: int, p: float) -> None:
    found = distributions.order_statistics(n, p, 0.95)
    assert found is not None
    low, high = found
    below = stats.binom(n, p).cdf
    assert below(low - 1) <= 0.025 < below(low)
    assert 1 - below(high - 1) <= 0.025 < 1 - below(high - 2)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (7, 10), (359, 359), (9_912, 10_000)])
def test_wilson(hits: int, n: int) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert distributions.wilson(hits, n, 0.95) == pytest.approx(tuple(expected))


def test_paired_difference_covers() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(1000):
        lost, gained, _ = random.multinomial(400, [0.03, 0.01, 0.96])
        low, high = distributions.paired_difference(int(lost), int(gained), 400, 0.95)
        covered += low <= 0.02 <= high
    assert 930 <= covered <= 985


@pytest.mark.parametrize(
    ("percentile", "queries", "rounded"), [(90, 23_886, 24_576), (95, 50_425, 57_344), (99, 262_742, 270_336)]
)
def test_the_counts_that_mlperf_publishes(percentile: float, queries: int, rounded: int) -> None:
    assert early_stopping.queries_for(percentile) == (queries, rounded)


def test_early_stopping_needs_64_queries_for_p90_as_loadgen_does() -> None:
    latencies = np.arange(1, 65) * 1_000_000
    assert early_stopping.estimates([latencies[:63]], [90]) == {"p90": None}
    assert early_stopping.estimates([latencies], [90]) == {"p90": 64.0}


@pytest.mark.parametrize("p", [50, 90, 99])
@pytest.mark.parametrize("n", [1_000, 24_576])
def test_early_stopping_discards_as_many_as_loadgen(n: int, p: int) -> None:
    """LoadGen: the most t whose least h, with odds(h, t) < 0.01, leaves h + t <= n."""
    (estimate,) = early_stopping.estimates([np.arange(1, n + 1) * 1_000_000], [p]).values()
    assert estimate is not None
    discarded = n + 1 - round(estimate)
    # BetaRegularized[p, h, t + 1], as its source has it
    assert stats.beta.cdf(p / 100, n - discarded, discarded + 1) < 0.01
    assert stats.beta.cdf(p / 100, n - discarded - 1, discarded + 2) >= 0.01


def latencies(normal: NDArray[np.float64]) -> NDArray[np.int64]:
    """A skewed distribution around 1 ms whose percentiles are those of the normal one."""
    return (np.exp(0.2 * normal) * 1e6).astype(np.int64)


TRUE = {p: math.exp(0.2 * stats.norm.ppf(p / 100)) for p in (50, 90, 99)}
TRUE_MEAN = math.exp(0.02)


def autocorrelated(random: np.random.Generator, n: int, rho: float) -> NDArray[np.float64]:
    noise = random.normal(size=n) * math.sqrt(1 - rho**2)
    noise[0] /= math.sqrt(1 - rho**2)
    return np.asarray(signal.lfilter([1], [1, -rho], noise))


SERIES: dict[str, Callable[[np.random.Generator], Rounds]] = {
    "independent": lambda random: [latencies(random.normal(size=2000))],
    "few": lambda random: [latencies(random.normal(size=400))],
    "three rounds": lambda random: [latencies(random.normal(size=2000)) for _ in range(3)],
    "autocorrelated": lambda random: [latencies(autocorrelated(random, 4000, 0.5))],
    "strongly autocorrelated": lambda random: [latencies(autocorrelated(random, 4000, 0.9))],
    "rounds that differ": lambda random: [
        latencies(0.5 * random.normal() + math.sqrt(0.75) * random.normal(size=1000)) for _ in range(5)
    ],
}


@pytest.mark.parametrize("kind", SERIES)
def test_intervals_hold_the_truth_as_often_as_they_say(kind: str) -> None:
    random = np.random.default_rng(11)
    held: dict[str, list[bool]] = {"p50": [], "p90": [], "p99": [], "mean": []}
    for _ in range(300):
        told = statistics.latency(SERIES[kind](random), 0.95)
        for name, true in (*((f"p{p}", value) for p, value in TRUE.items()), ("mean", TRUE_MEAN)):
            if told[name]["value"] is not None:
                held[name].append(told[name]["low"] <= true <= told[name]["high"])
    # the tail of few rounds that differ is known least: none of them may have been an extreme one
    differ = kind == "rounds that differ"
    least = {"p50": 0.92, "p90": 0.88 if differ else 0.92, "p99": 0.82 if differ else 0.92, "mean": 0.92}
    for name, outcomes in held.items():
        assert len(outcomes) > 100
        assert np.mean(outcomes) >= least[name], name


def test_taking_dependent_samples_for_independent_would_not_hold() -> None:
    """What the coverage above would be without the effective sample size."""
    random = np.random.default_rng(11)
    held = 0
    for _ in range(200):
        ordered = np.sort(SERIES["strongly autocorrelated"](random)[0])
        ranks = distributions.order_statistics(len(ordered), 0.5, 0.95)
        assert ranks is not None
        held += ordered[ranks[0] - 1] <= TRUE[50] * 1e6 <= ordered[ranks[1] - 1]
    assert held / 200 < 0.6


def test_dependent_samples_are_worth_fewer() -> None:
    random = np.random.default_rng(3)
    n = 20_000
    independent = intervals.effective([latencies(random.normal(size=n))], 50, 0.95)
    dependent = intervals.effective([latencies(autocorrelated(random, n, 0.9))], 50, 0.95)
    assert 0.3 * n < independent <= n
    assert dependent < 0.3 * n


def test_percentiles_of_a_known_series() -> None:
    told = statistics.latency([np.random.default_rng(0).permutation(np.arange(1, 1001)) * 1_000_000], 0.95)
    assert told["p50"]["value"] == pytest.approx(500.5)
    assert told["p90"]["value"] == pytest.approx(900.1)
    assert told["p50"]["low"] < 500 < told["p50"]["high"]
    assert (told["min"], told["max"], told["mean"]["value"]) == (1.0, 1000.0, 500.5)


def test_a_percentile_that_the_samples_do_not_support_is_not_given_and_says_how_many_would() -> None:
    told = statistics.latency([latencies(np.random.default_rng(0).normal(size=200))], 0.95)
    assert told["p90"]["value"] is not None
    assert {key: told["p99"][key] for key in ("value", "low", "high")} == dict.fromkeys(("value", "low", "high"))
    assert 368 <= told["p99"]["needs"] <= 2 * 368
    more = statistics.latency([latencies(np.random.default_rng(0).normal(size=2 * told["p99"]["needs"]))], 0.95)
    assert more["p99"]["value"] is not None


def test_equal_samples_have_an_interval_of_no_width() -> None:
    told = statistics.latency([np.full(1000, 1_000_000)], 0.95)
    assert told["p99"] == {"value": 1.0, "low": 1.0, "high": 1.0, "needs": None}
    assert told["mean"] == {"value": 1.0, "low": 1.0, "high": 1.0, "needs": None}


def test_a_single_sample_has_a_mean_and_no_interval() -> None:
    assert intervals.mean([np.array([5])], 0.95) == {"value": 5.0, "low": None, "high": None, "needs": None}


def written(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Two rounds in files, as the agent writes them: 1 ms a query, batches of 8 in 4 ms, 10 W."""
    random = np.random.default_rng(1)
    rounds = []
    for index in range(2):
        (folder / f"round-{index}").mkdir()
        entries = []
        begin = 1_000_000_000
        for name, batch, took in (("SingleStream", 1, 1e6), ("Offline", 1, 1e6), ("Offline", 8, 4e6)):
            file = f"round-{index}/{name}-{batch}.npy"
            series = (took * random.normal(1, 0.02, 2000)).astype(np.int64)
            np.save(folder / file, series)
            end = begin + int(series.sum())
            entry = {
                "name": name,
                "batch": batch,
                "file": file,
                "queries": 2000,
                "began_ns": begin,
                "ended_ns": end,
            }
            entries.append(entry | {"cpu": {"involuntary_switches": 0}})
            begin = end
        times = list(range(500_000_000, begin, 100_000_000))
        channel = {"name": "VDD_IN power", "kind": "power", "unit": "W", "source": "tegrastats"}
        values = [None, *(10 + 0.1 * random.normal() for _ in times[1:])]
        told = {"interval_ms": 100, "times_ns": times, "channels": [channel | {"values": values}], "notes": []}
        (folder / f"round-{index}/telemetry.json").write_text(json.dumps(told | changes))
        rounds.append({"scenarios": entries, "telemetry": f"round-{index}/telemetry.json"})
    return rounds


def test_everything_is_made_from_the_raw_files(tmp_path: Path) -> None:
    told = statistics.summarise(tmp_path, written(tmp_path), "SingleStream", 0.95)
    assert (told["scenario"], told["samples"], told["confidence"]) == ("SingleStream", 4000, 0.95)
    assert told["latency_ms"]["p50"]["value"] == pytest.approx(1, rel=0.005)
    assert told["latency_ms"] == told["scenarios"]["SingleStream"]["latency_ms"]
    assert told["scenarios"]["SingleStream"]["queries"] == 4000
    assert told["scenarios"]["SingleStream"]["seconds"] == pytest.approx(4, rel=0.01)
    assert [entry["batch"] for entry in told["batches"]] == [1, 8]
    assert told["throughput"]["batch"] == 8
    rate = told["throughput"]["samples_per_s"]
    assert rate["low"] < 2000 < rate["high"]
    assert rate["high"] / rate["low"] < 1.01
    assert told["stability"] == {"stable": True, "findings": []}
    assert told["early_stopping"]["p99"] > told["latency_ms"]["p99"]["value"]
    json.dumps(told)


def test_power_is_that_of_the_single_queries_and_shared_among_them(tmp_path: Path) -> None:
    power = statistics.summarise(tmp_path, written(tmp_path), "SingleStream", 0.95)["power"]
    assert power["source"] == "the board's input: VDD_IN power"
    assert power["watts"]["value"] == pytest.approx(10, rel=0.01)
    assert power["watts"]["low"] < 10 < power["watts"]["high"]
    assert power["energy_mj"]["value"] == pytest.approx(10, rel=0.02)  # 10 W for 1 ms


def test_power_from_a_counter_of_energy(tmp_path: Path) -> None:
    times = list(range(0, 20_000_000_000, 100_000_000))
    channel = {"name": "package-0 energy", "kind": "energy", "unit": "J", "source": "RAPL"}
    values = [0.5 * index for index in range(len(times))]  # 5 W
    rounds = written(tmp_path, times_ns=times, channels=[channel | {"values": values}])
    power = statistics.summarise(tmp_path, rounds, "SingleStream", 0.95)["power"]
    assert power["watts"] == {"value": 5.0, "low": 5.0, "high": 5.0, "needs": None}


def test_without_a_sensor_there_is_no_power(tmp_path: Path) -> None:
    rounds = written(tmp_path)
    bare = [entry | {"telemetry": None} for entry in rounds]
    assert statistics.summarise(tmp_path, bare, "SingleStream", 0.95)["power"] is None


def test_a_scenario_that_was_not_measured_is_replaced_and_named(tmp_path: Path) -> None:
    assert statistics.summarise(tmp_path, written(tmp_path), "DutyCycle", 0.95)["scenario"] == "SingleStream"
