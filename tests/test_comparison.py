"""Two engines held against each other, on bursts whose truth is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from toolkit.bench.comparison import LEVEL, compare, log_ratio
from toolkit.errors import StageError

QUERIES = 20


def process(
    folder: Path,
    random: np.random.Generator,
    ratio: float,
    *,
    groups: int = 10,
    effect: float = 0.01,
    drift: float = 0.0,
) -> Path:
    """Write what one process measured: bursts in the order A B B A or B A A B, as the agent takes them.

    Args:
        ratio: Of b's queries to a's.
        effect: Standard deviation of what a process's luck makes of the ratio.
        drift: What all latencies rise by from begin to end.
    """
    luck = math.exp(random.normal(0, effect))
    sides = [side for _ in range(groups) for side in ((0, 1, 1, 0), (1, 0, 0, 1))[random.integers(2)]]
    taken: tuple[list[float], list[float]] = ([], [])
    bursts = []
    for turn, side in enumerate(sides):
        level = (1 + drift * turn / len(sides)) * (ratio * luck if side else 1) * math.exp(random.normal(0, 0.02))
        bursts.append((side, len(taken[side]), QUERIES))
        taken[side].extend(1e6 * level * np.exp(0.05 * random.normal(size=QUERIES) ** 2))
    folder.mkdir(parents=True)
    for name, times in zip("ab", taken, strict=True):
        np.save(folder / f"{name}.npy", np.array(times, np.int64))
    np.save(folder / "bursts.npy", np.array(bursts, np.int64))
    return folder


def significant(tmp_path: Path, ratio: float, comparisons: int, level: float) -> float:
    random = np.random.default_rng(7)
    found = 0
    for number in range(comparisons):
        folders = [process(tmp_path / f"{number}-{index}", random, ratio) for index in range(5)]
        found += compare(folders, level)["significant"]
    return found / comparisons


def test_an_engine_against_itself_differs_no_more_often_than_the_level(tmp_path: Path) -> None:
    assert 0.01 <= significant(tmp_path, 1.0, 200, 0.05) <= 0.08  # 0.05 ± two standard errors


@pytest.mark.parametrize(("slower", "least"), [(1.03, 0.5), (1.05, 0.9), (0.95, 0.9), (1.1, 1.0)])
def test_a_difference_is_found(tmp_path: Path, slower: float, least: float) -> None:
    assert significant(tmp_path, slower, 50, LEVEL) >= least


def test_a_drift_of_the_device_favours_neither(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    ratios = [
        log_ratio(process(tmp_path / str(index), random, 1.0, groups=50, effect=0, drift=1.0))
        for index in range(20)
    ]
    assert abs(np.mean(ratios)) < 0.005


def test_a_disturbed_burst_does_not_count(tmp_path: Path) -> None:
    folder = process(tmp_path / "0", np.random.default_rng(3), 1.0, effect=0)
    before = log_ratio(folder)
    slow = np.load(folder / "b.npy")
    slow[:QUERIES] *= 10
    np.save(folder / "b.npy", slow)
    assert log_ratio(folder) == pytest.approx(before, abs=0.02)


def test_what_a_comparison_says(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    folders = [process(tmp_path / str(index), random, 1.1, effect=0.002, groups=50) for index in range(5)]
    found = compare(folders)
    assert (found["significant"], found["processes"], found["level"]) == (True, 5, LEVEL)
    ratio = found["ratio"]
    assert ratio["low"] < 1.1 < ratio["high"]
    low, high = (100 * (ratio[end] - 1) for end in ("low", "high"))
    assert found["sentence"] == f"latency is {100 * (ratio['value'] - 1):.1f} % higher ({low:.1f} to {high:.1f} %)"
    faster = compare([process(tmp_path / f"f{index}", random, 0.9, effect=0.002, groups=50) for index in range(5)])
    assert "% lower (9." in faster["sentence"] or "% lower (8." in faster["sentence"]
    same = compare([process(tmp_path / f"s{index}", random, 1.0) for index in range(5)])
    assert same["sentence"].startswith("no significant difference in latency (-")


def test_the_interval_is_students_over_processes(tmp_path: Path) -> None:
    from scipy import stats

    random = np.random.default_rng(1)
    folders = [process(tmp_path / str(index), random, 1.1) for index in range(4)]
    logs = [log_ratio(folder) for folder in folders]
    expected = stats.t.interval(1 - LEVEL, 3, np.mean(logs), stats.sem(logs))
    ratio = compare(folders)["ratio"]
    assert (math.log(ratio["low"]), math.log(ratio["high"])) == pytest.approx(expected, abs=1e-5)


def test_two_processes_are_too_few(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    with pytest.raises(StageError, match="needs 3 processes at least, and there are 2") as error:
        compare([process(tmp_path / str(index), random, 1.1) for index in range(2)])
    assert error.value.hint
