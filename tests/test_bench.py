from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from toolkit.bench import contract, statistics
from toolkit.config import Contract

BENCH: dict[str, Any] = {
    "samples": 1000,
    "latency_ms": {"p50": 1.0, "p90": 2.0, "p99": 3.0},
    "throughput": {"samples_per_s": 900.0, "batch": 8},
    "accuracy": 0.95,
    "not_measured": {},
    "peak_memory_bytes": 100_000_000,
}


@pytest.mark.parametrize(("percentile", "needed"), [(50, 5), (90, 29), (99, 299), (99.9, 2995)])
def test_samples_needed(percentile: float, needed: int) -> None:
    assert statistics.samples_needed(percentile) == needed
    assert 1 - (percentile / 100) ** needed >= 0.95 > 1 - (percentile / 100) ** (needed - 1)


def test_percentiles_of_a_known_series() -> None:
    summary = statistics.summarise(np.arange(1, 1001, dtype=np.int64) * 1_000_000)
    assert summary["p50"] == pytest.approx(500.5)
    assert summary["p99"] == pytest.approx(990.01)
    assert (summary["min"], summary["max"], summary["mean"]) == (1.0, 1000.0, 500.5)


def test_a_percentile_that_the_samples_do_not_support_is_not_given() -> None:
    summary = statistics.summarise(np.full(298, 1_000_000, np.int64))
    assert summary["p99"] is None
    assert summary["p90"] == 1.0


CLAUSES = [
    ("latency_p50", "1 ms", "0.9 ms"),
    ("latency_p99", "3 ms", "2999 us"),
    ("throughput", "900 samples/s", "901 samples/s"),
    ("min_accuracy", "95 %", "95.1 %"),
    ("max_accuracy_drop", "3.01 %", "2.9 %"),
    ("peak_memory", "100 MB", "99.9 MB"),
    ("engine_size", "2 MB", "1.99 MB"),
]


@pytest.mark.parametrize(("clause", "kept", "broken"), CLAUSES)
def test_each_clause_is_kept_at_its_limit_and_broken_beyond(clause: str, kept: str, broken: str) -> None:
    for limit, passed in ((kept, True), (broken, False)):
        verdict = contract.judge(Contract(**{clause: limit}), BENCH, 0.98, 2_000_000)
        assert verdict.passed is passed
        (line,) = verdict.lines
        assert line.passed is passed
        assert line.measured is not None
        assert contract.show(line.limit, line.unit) in line.reason


def test_one_broken_clause_breaks_the_contract() -> None:
    verdict = contract.judge(Contract(latency_p50="2 ms", throughput="1000 samples/s"), BENCH, 0.98, 1)
    assert [line.passed for line in verdict.lines] == [True, False]
    assert not verdict.passed
    assert verdict.lines[1].reason == "100 samples/s below the limit of 1,000 samples/s"


def test_an_unsupported_percentile_is_undecided_with_its_reason() -> None:
    bench = BENCH | {"samples": 100, "latency_ms": {"p50": 1.0, "p90": 2.0, "p99": None}}
    (line,) = contract.judge(Contract(latency_p99="1 s"), bench, 0.98, 1).lines
    assert not line.passed
    assert line.status == "undecided"
    assert line.reason == "100 samples, and p99 needs 299"


UNLABELLED = BENCH | {"accuracy": None, "not_measured": {"accuracy": "the data have no labels"}}


@pytest.mark.parametrize("clause", ["min_accuracy", "max_accuracy_drop"])
def test_a_clause_on_an_accuracy_that_was_not_measured_is_undecided(clause: str) -> None:
    verdict = contract.judge(Contract(**{clause: "50 %"}), UNLABELLED, None, 1)
    (line,) = verdict.lines
    assert (line.status, line.measured) == ("undecided", None)
    assert line.reason == "not measured: the data have no labels"
    assert (verdict.status, verdict.passed) == ("undecided", False)
    assert verdict.as_json()["lines"][0]["passed"] is False


def test_a_broken_clause_counts_more_than_an_undecided_one() -> None:
    for limit, status in (("2 ms", "undecided"), ("1 us", "failed")):
        clauses = Contract(latency_p50=limit, min_accuracy="50 %")
        assert contract.judge(clauses, UNLABELLED, None, 1).status == status


def test_without_a_clause_on_it_an_accuracy_may_be_missing() -> None:
    assert contract.judge(Contract(latency_p50="2 ms"), UNLABELLED, None, 1).passed


def test_an_empty_contract_is_kept() -> None:
    assert contract.judge(Contract(), BENCH, 0.98, 1).passed
