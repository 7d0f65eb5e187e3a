"""The contract held against measurements."""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.bench import contract
from toolkit.config import Contract


def figure(value: float | None, spread: float = 0.0, needs: int | None = None) -> dict[str, Any]:
    ends = (None, None) if value is None else (value - spread, value + spread)
    return {"value": value, "low": ends[0], "high": ends[1], "needs": needs}


BENCH: dict[str, Any] = {
    "scenario": "SingleStream",
    "samples": 1000,
    "latency_ms": {"p50": figure(1.0), "p90": figure(2.0), "p99": figure(3.0)},
    "throughput": {"batch": 8, "samples_per_s": figure(900.0)},
    "power": {"watts": figure(10.0), "energy_mj": figure(5.0), "source": "the board's input: VDD_IN"},
    "accuracy": 0.95,
    "images": 1000,
    "attribution": None,
    "regression": {"against": "0123", "ratio": figure(1.02), "significant": True},
    "not_measured": {},
    "peak_memory_bytes": 100_000_000,
}


CLAUSES = [
    ("latency_p50", "1 ms", "0.9 ms"),
    ("latency_p99", "3 ms", "2999 us"),
    ("throughput", "900 samples/s", "901 samples/s"),
    ("min_accuracy", "95 %", "95.1 %"),
    ("max_accuracy_drop", "3.01 %", "2.9 %"),
    ("peak_memory", "100 MB", "99.9 MB"),
    ("engine_size", "2 MB", "1.99 MB"),
    ("power", "10 W", "9999 mW"),
    ("energy", "5 mJ", "4.99 mJ"),
    ("max_regression", "2.001 %", "1.999 %"),
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


ESTIMATED = [
    (
        "latency_p50",
        "ms",
        {"latency_ms": {"p50": figure(1.0, 0.1), "p90": figure(1.0), "p99": figure(1.0)}},
        "0.9 ms",
    ),
    ("throughput", "/s", {"throughput": {"batch": 8, "samples_per_s": figure(1.0, 0.1)}}, "1.1 /s"),
    ("power", "W", {"power": {"watts": figure(1.0, 0.1), "energy_mj": figure(1.0)}}, "0.9 W"),
    ("energy", "mJ", {"power": {"watts": figure(1.0), "energy_mj": figure(1.0, 0.1)}}, "0.9 mJ"),
]


@pytest.mark.parametrize(("clause", "unit", "found", "worse"), ESTIMATED)
def test_an_interval_decides_when_the_limit_lies_outside(
    clause: str, unit: str, found: dict[str, Any], worse: str
) -> None:
    sign = -1 if clause == "throughput" else 1
    for limit, status in ((1 + sign * 0.11, "passed"), (1 + sign * 0.05, "undecided"), (1 - sign * 0.11, "failed")):
        verdict = contract.judge(Contract(**{clause: f"{limit:g} {unit}"}), BENCH | found, 0.98, 1)
        (line,) = verdict.lines
        assert (line.status, verdict.status) == (status, status)
        assert (line.low, line.high) == (0.9, 1.1)
        assert contract.undecided_by_time(verdict) == (status == "undecided")
    straddled = contract.judge(Contract(**{clause: f"1 {unit}"}), BENCH | found, 0.98, 1).lines[0]
    assert straddled.reason.startswith("the limit of 1")
    at_its_end = contract.judge(Contract(**{clause: worse}), BENCH | found, 0.98, 1).lines[0]
    assert at_its_end.status == "undecided", "the interval's end may be the truth, and would keep the clause"


def test_a_regression_is_judged_by_its_interval() -> None:
    found = {"regression": {"against": "0123", "ratio": figure(1.02, 0.02), "significant": True}}
    for limit, status in (("5 %", "passed"), ("3 %", "undecided")):
        verdict = contract.judge(Contract(max_regression=limit), BENCH | found, 0.98, 1)
        (line,) = verdict.lines
        assert line.status == status
        assert (line.measured, line.low, line.high) == pytest.approx((0.02, 0.0, 0.04))
        assert contract.undecided_by_time(verdict) == (status == "undecided")


def test_without_a_current_release_nothing_can_regress() -> None:
    (line,) = contract.judge(Contract(max_regression="3 %"), BENCH | {"regression": None}, 0.98, 1).lines
    assert (line.status, line.measured, line.reason) == ("passed", None, "no other release is current there")


def test_a_regression_that_could_not_be_measured_is_undecided() -> None:
    bench = BENCH | {"regression": None, "not_measured": {"regression": "trtexec loads one engine at a time"}}
    verdict = contract.judge(Contract(max_regression="3 %"), bench, 0.98, 1)
    assert verdict.lines[0].reason == "not measured: trtexec loads one engine at a time"
    assert verdict.status == "undecided"
    assert not contract.undecided_by_time(verdict)


def test_an_unsupported_percentile_is_undecided_and_time_would_decide_it() -> None:
    latency = {"p50": figure(1.0), "p90": figure(2.0), "p99": figure(None, needs=1368)}
    verdict = contract.judge(Contract(latency_p99="1 s"), BENCH | {"samples": 100, "latency_ms": latency}, 0.98, 1)
    (line,) = verdict.lines
    assert not line.passed
    assert line.status == "undecided"
    assert line.reason == "100 queries, and p99 needs 1,368 like them"
    assert contract.undecided_by_time(verdict)


def test_a_scenario_that_was_not_measured_is_undecided() -> None:
    bench = BENCH | {"not_measured": {"DutyCycle": "trtexec has no pauses"}}
    verdict = contract.judge(Contract(latency_p50="1 s", scenario="DutyCycle"), bench, 0.98, 1)
    assert verdict.lines[0].reason == "not measured: trtexec has no pauses"
    assert not contract.undecided_by_time(verdict)


def test_a_failed_clause_is_not_measured_on_for_another_that_is_undecided() -> None:
    clauses = Contract(throughput="900 /s", engine_size="1 B")
    bench = BENCH | {"throughput": {"batch": 8, "samples_per_s": figure(900.0, 10)}}
    verdict = contract.judge(clauses, bench, 0.98, 2)
    assert [line.status for line in verdict.lines] == ["undecided", "failed"]
    assert not contract.undecided_by_time(verdict)


def test_power_that_the_device_does_not_tell_is_undecided() -> None:
    verdict = contract.judge(Contract(power="10 W", energy="5 mJ"), BENCH | {"power": None}, 0.98, 1)
    assert {line.status for line in verdict.lines} == {"undecided"}
    assert "no power" in verdict.lines[0].reason
    assert not contract.undecided_by_time(verdict)


def test_accuracy_is_decided_by_its_value_and_shown_with_its_interval() -> None:
    steps = [{"lost": 20, "gained": 5}, {"lost": 15, "gained": 0}]
    clauses = Contract(min_accuracy="95 %", max_accuracy_drop="3.1 %")
    verdict = contract.judge(clauses, BENCH | {"attribution": {"steps": steps}}, 0.98, 1)
    accuracy, drop = verdict.lines
    assert verdict.passed
    assert accuracy.low is not None
    assert accuracy.high is not None
    assert accuracy.low < 0.95 < accuracy.high
    assert drop.low is not None
    assert drop.high is not None
    assert 0.01 < drop.low < 0.03 < drop.high < 0.05


def test_a_document_has_a_line_as_it_is_told() -> None:
    line = contract.judge(Contract(latency_p50="2 ms"), BENCH, 0.98, 1).as_json()["lines"][0]
    assert line == {
        "what": "latency p50",
        "limit": 2.0,
        "measured": 1.0,
        "low": 1.0,
        "high": 1.0,
        "unit": "ms",
        "status": "passed",
        "passed": True,
        "reason": "1.000 ms within the limit of 2.000 ms",
    }


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
