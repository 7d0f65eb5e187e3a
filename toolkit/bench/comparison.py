"""Two releases held against each other: is one slower, by how much, or can nobody tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.bench.distributions import t_quantile
from toolkit.bench.intervals import figure
from toolkit.errors import StageError

# strict: whoever compares fifty times an engine with itself should hardly ever be told of a difference
LEVEL = 0.02
PROCESSES = 8
DURATION_MS = 1000.0
_LEAST = 3  # processes: with two, Student's interval is 13 times as wide as their spread


def compare(processes: Sequence[Path], level: float = LEVEL) -> dict[str, Any]:
    """Return how much slower b is than a.

    The unit is the process (Kalibera and Jones, Rigorous benchmarking in reasonable time, ISMM 2013): where memory
    lies and which CPU it gets are drawn anew for each, and differ more than queries within one. A process counts
    with a single number, see :func:`log_ratio`; the interval is Student's over these.

    Args:
        processes: A folder each, with ``a.npy``, ``b.npy`` (nanoseconds a query, int64 ``(N,)``) and ``bursts.npy``
            (int64 ``(K, 3)``: 0 for a or 1 for b, index of its first query, queries).
        level: How often a difference is found where there is none, 0 to 1.

    Returns:
        ``ratio`` (figure, b/a), ``significant``, ``processes`` (how many), ``level`` and ``sentence``.

    Raises:
        StageError: Fewer than three processes.
    """
    count = len(processes)
    if count < _LEAST:
        raise StageError(
            f"a comparison needs {_LEAST} processes at least, and there are {count}", "give it more time"
        )
    logs = np.array([log_ratio(folder) for folder in processes])
    centre = float(logs.mean())
    half = t_quantile(1 - level, count - 1) * float(logs.std(ddof=1)) / math.sqrt(count)
    value, low, high = (math.exp(end) for end in (centre, centre - half, centre + half))
    significant = not low <= 1 <= high
    return {
        "ratio": figure(round(value, 6), round(low, 6), round(high, 6)),
        "significant": significant,
        "processes": count,
        "level": level,
        "sentence": _sentence(value, low, high, significant),
    }


def log_ratio(folder: Path) -> float:
    """Return the logarithm of b/a in one process: the median over pairs of neighbouring bursts, one of each.

    A burst counts with its median. Neighbours meet the same device, and half of the pairs begin with each.
    """
    queries = [np.load(folder / "a.npy"), np.load(folder / "b.npy")]
    bursts = np.load(folder / "bursts.npy")
    bursts = bursts[: len(bursts) // 2 * 2]
    medians = np.log([np.median(queries[side][first : first + count]) for side, first, count in bursts])
    signed = np.where(bursts[:, 0] == 1, medians, -medians)
    return float(np.median(signed.reshape(-1, 2).sum(1)))


def _sentence(ratio: float, low: float, high: float, significant: bool) -> str:
    change, *ends = ((end - 1) * 100 for end in (ratio, low, high))
    if not significant:
        return f"no significant difference in latency ({ends[0]:+.1f} to {ends[1]:+.1f} %)"
    near, far = sorted(map(abs, ends))
    return f"latency is {abs(change):.1f} % {'higher' if change > 0 else 'lower'} ({near:.1f} to {far:.1f} %)"
