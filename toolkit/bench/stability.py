"""Whether a measurement was taken in steady conditions; if not, why not, and what would help."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.bench.distributions import normal_quantile
from toolkit.bench.series import Channel, Run

_BLOCKS = 20
_LEAST = 5 * _BLOCKS  # samples that a run's course is judged from
_MATTERS = 0.02  # what latency has to change by, from begin to end, to be called a drift or a step
_ROUNDS_MATTER = 0.05  # what the rounds' medians have to lie apart
_MODES_MATTER = 0.03  # what two modes have to lie apart
_MODE_WEIGHT = 0.05  # of all queries, in the smaller one
_CLOCKS_MATTER = 0.03
_STEAL_MATTERS, _LOAD_MATTERS = 1.0, 10.0  # percent of the CPUs' time
_SWITCHES_MATTER = 0.01, 5.0  # of the queries, so that p99 speaks of them; and a second


@dataclass(frozen=True)
class Finding:
    """What was not steady: in a word, with figures, and what would help in this setup."""

    what: str
    text: str
    hint: str


@dataclass(frozen=True)
class _Setup:
    """What the user, and the agent for him, have done already."""

    locked: bool = False
    power_mode: str | None = None
    affinity: frozenset[str] = frozenset()  # clocks of the CPUs that it is bound to

    @classmethod
    def of(cls, rounds: Sequence[Mapping[str, Any]]) -> _Setup:
        done = (rounds[0].get("tuning") or {}).get("set", {})
        locked = any("clocks" in name or "governor" in name for name in done)
        bound = (rounds[0].get("conditions") or {}).get("affinity") or ()
        return cls(locked, done.get("power mode"), frozenset(f"cpu{cpu} clock" for cpu in bound))

    def lock_or(self, otherwise: str) -> str:
        """Return the hint for clocks that are free, or another where they are locked already."""
        return otherwise if self.locked else "lock the clocks while measuring: 'clocks: locked' in the target file"


def judge(runs: Sequence[Run], rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``stable`` and ``findings`` of a measurement.

    Args:
        runs: The scenario whose latency counts, of every round.
        rounds: What the agent said of each; ``warmup`` and ``tuning`` count where they are there.
    """
    setup = _Setup.of(rounds)
    long_enough = [run.series for run in runs if len(run.series) >= _LEAST]
    course = [*_steps(long_enough, setup)] or [*_drift(long_enough, setup)]
    findings = [
        *course,
        *([] if course else _modes(long_enough, setup)),
        *_rounds(long_enough, setup),
        *_clocks(runs, setup),
        *_throttling(runs, setup),
        *_noise(runs),
        *_warmup(rounds, setup),
    ]
    return {"stable": not findings, "findings": [asdict(finding) for finding in findings]}


def _medians(series: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the medians of 20 consecutive blocks in milliseconds."""
    return np.array([np.median(block) for block in np.array_split(series, _BLOCKS)]) / 1e6


def _drift(rounds: Sequence[NDArray[np.int64]], setup: _Setup) -> Iterator[Finding]:
    """Find a trend: Mann and Kendall's test over all rounds at 1 %, Theil and Sen's slope at least 2 % a round."""
    if not rounds:
        return
    first, second = np.triu_indices(_BLOCKS, 1)
    concordance, changes = 0.0, []
    for series in rounds:
        medians = _medians(series)
        rises = medians[second] - medians[first]
        concordance += float(np.sign(rises).sum())
        changes.append(float(np.median(rises / (second - first))) * (_BLOCKS - 1) / float(np.median(medians)))
    spread = math.sqrt(len(rounds) * _BLOCKS * (_BLOCKS - 1) * (2 * _BLOCKS + 5) / 18)
    change = float(np.median(changes))
    if abs(concordance) / spread > normal_quantile(0.99) and abs(change) >= _MATTERS:
        slower = change > 0
        yield Finding(
            "drift",
            f"latency becomes {abs(change):.1%} {'higher' if slower else 'lower'} from begin to end of a round",
            setup.lock_or("let the device cool down, or choose a lower 'power_mode' in the target file")
            if slower
            else "let it warm up longer: 'benchmark.warmup' in the profile",
        )


def _steps(rounds: Sequence[NDArray[np.int64]], setup: _Setup) -> Iterator[Finding]:
    """Find a change of level: two constants fit a round's blocks much better than one, or than a line."""
    positions = np.arange(_BLOCKS)
    for number, series in enumerate(rounds, 1):
        medians = _medians(series)
        costs = {split: _misfit(medians[:split]) + _misfit(medians[split:]) for split in range(2, _BLOCKS - 1)}
        split = min(costs, key=lambda at: costs[at])
        before, after = float(np.median(medians[:split])), float(np.median(medians[split:]))
        line = np.polyval(np.polyfit(positions, medians, 1), positions)
        step = abs(after - before)
        if (
            step >= _MATTERS * before
            and step >= 4 * costs[split] / _BLOCKS
            and costs[split] <= 0.5 * min(_misfit(medians), float(np.abs(medians - line).sum()))
        ):
            yield Finding(
                "drift",
                f"latency goes from {before:.3f} to {after:.3f} ms at once, "
                f"{split / _BLOCKS:.0%} into round {number}",
                setup.lock_or("close other programs on the device, and measure longer: 'benchmark.duration'"),
            )
            return


def _misfit(values: NDArray[np.float64]) -> float:
    return float(np.abs(values - np.median(values)).sum())


def _modes(rounds: Sequence[NDArray[np.int64]], setup: _Setup) -> Iterator[Finding]:
    """Find two modes: peaks of a kernel estimate of log latency with a valley between.

    The bandwidth is Silverman's with 1.3 in place of 0.9, since a long tail's bumps are no modes. The valley is at
    most half as high as the lower peak, and each side of it holds at least 5 % of the queries. Rounds are laid over
    each other: what they differ by is found elsewhere.
    """
    if not rounds:
        return
    # 2,000 quantiles stand for the samples; the outermost would only stretch the grid
    medians = [float(np.median(series)) for series in rounds]
    level = float(np.median(medians))
    laid = np.concatenate([series * (level / median) for series, median in zip(rounds, medians, strict=True)])
    logs = np.quantile(np.log(laid), np.linspace(0.002, 0.998, 2000))
    quartiles = np.quantile(logs, [0.25, 0.75])
    spread = min(float(logs.std()), float(quartiles[1] - quartiles[0]) / 1.34)
    width = 1.3 * max(spread, 1e-4) * min(len(laid), 2000) ** -0.2
    grid = np.linspace(logs[0] - 3 * width, logs[-1] + 3 * width, 512)
    density = np.exp(-(((grid[:, None] - logs) / width) ** 2) / 2).sum(1)
    within = np.searchsorted(logs, grid) / len(logs)
    inner = density[1:-1]
    peaks = 1 + np.flatnonzero((inner > density[:-2]) & (inner >= density[2:]))
    for left, right in itertools.pairwise(peaks):
        valley = left + int(np.argmin(density[left : right + 1]))
        weight = float(within[valley])
        apart = math.exp(grid[right] - grid[left]) - 1
        deep = density[valley] <= 0.5 * min(density[left], density[right])
        if deep and _MODE_WEIGHT <= weight <= 1 - _MODE_WEIGHT and apart >= _MODES_MATTER:
            highest = np.argmax(density[:valley]), valley + np.argmax(density[valley:])
            low, high = (math.exp(grid[peak]) / 1e6 for peak in highest)
            yield Finding(
                "bimodal",
                f"latency has two modes: {low:.3f} ms ({weight:.0%} of the queries) and {high:.3f} ms",
                setup.lock_or("close other programs on the device, or use fewer 'threads' in the target file"),
            )
            return


def _rounds(rounds: Sequence[NDArray[np.int64]], setup: _Setup) -> Iterator[Finding]:
    medians = [float(np.median(series)) / 1e6 for series in rounds]
    if len(medians) > 1 and max(medians) >= (1 + _ROUNDS_MATTER) * min(medians):
        yield Finding(
            "drift",
            f"the rounds' medians lie between {min(medians):.3f} and {max(medians):.3f} ms",
            setup.lock_or("measure more rounds: a longer 'benchmark.time_limit', and close other programs there"),
        )


def _clocks(runs: Sequence[Run], setup: _Setup) -> Iterator[Finding]:
    found = _by_name(runs, "clock")
    cpus = {name: found.pop(name) for name in list(found) if re.fullmatch(r"cpu\d+ clock", name)}
    if setup.affinity:
        found |= {name: values for name, values in cpus.items() if name in setup.affinity}
    elif cpus:  # where it ran is not known, but not on those that sleep
        shortest = min(map(len, cpus.values()))
        found["the fastest CPU's clock"] = np.max([values[:shortest] for values in cpus.values()], axis=0)
    for name, values in found.items():
        low, high = (float(end) for end in np.quantile(values, [0.05, 0.95]))
        if low > 0 and high > (1 + _CLOCKS_MATTER) * low:
            yield Finding(
                "clocks",
                f"{name} went between {low:,.0f} and {high:,.0f} MHz while it was measured",
                setup.lock_or(
                    "clocks are locked already, so that heat or a power limit lowers them: see 'power_mode'"
                ),
            )


def _throttling(runs: Sequence[Run], setup: _Setup) -> Iterator[Finding]:
    names = [name for name, values in _by_name(runs, "throttle").items() if values.any()]
    if names:
        mode = f"than {setup.power_mode} " if setup.power_mode else ""
        yield Finding(
            "throttling",
            f"the device slowed itself down while it was measured: {', '.join(names)}",
            f"cool it, or set a lower 'power_mode' {mode}in the target file, which it can keep up",
        )


def _noise(runs: Sequence[Run]) -> Iterator[Finding]:
    for kind, limit, words, hint in (
        ("steal", _STEAL_MATTERS, "another virtual machine took", "use a machine that is not shared"),
        ("load", _LOAD_MATTERS, "other programs took", "close them, or measure when the device is idle"),
    ):
        for name, values in _by_name(runs, kind).items():
            if float(values.mean()) >= limit and "GPU" not in name:  # a GPU's load is the benchmark's own
                yield Finding("noise", f"{words} {values.mean():.0f} % of the CPUs' time", hint)
    counts = [run.entry["cpu"]["involuntary_switches"] for run in runs if run.entry.get("cpu")]
    seconds = sum(run.seconds for run in runs)
    share = sum(counts) / sum(len(run.series) for run in runs)
    if share >= _SWITCHES_MATTER[0] and sum(counts) >= _SWITCHES_MATTER[1] * seconds:
        yield Finding(
            "noise",
            f"other programs interrupted it {sum(counts):,} times in {seconds:.1f} s, {share:.1%} of the queries",
            "close other programs on the device, or use fewer 'threads' than it has cores",
        )


def _warmup(rounds: Sequence[Mapping[str, Any]], setup: _Setup) -> Iterator[Finding]:
    unsteady = [warmup for entry in rounds if (warmup := entry.get("warmup")) and not warmup["steady"]]
    if unsteady:
        longest = max(float(warmup["ms"]) for warmup in unsteady) / 1e3
        also = "" if setup.locked else ", or lock the clocks ('clocks: locked' in the target file)"
        yield Finding(
            "unsteady warm-up",
            f"latency was not steady after {longest:.1f} s of warm-up ({len(unsteady)} of {len(rounds)} rounds)",
            f"let it warm up longer ('benchmark.warmup' in the profile){also}",
        )


def _by_name(runs: Sequence[Run], kind: str) -> dict[str, NDArray[np.float64]]:
    found: dict[str, list[Channel]] = {}
    for run in runs:
        for channel in run.of_kind(kind):
            found.setdefault(channel.name, []).append(channel)
    return {name: np.concatenate([channel.values for channel in of]) for name, of in found.items()}
