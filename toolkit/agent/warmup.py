"""The warm-up: as long as it takes until the times no longer go anywhere."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from . import scenarios

_FIRST_LOOK = 250_000_000  # nanoseconds
_LATER = 1.4  # every further look comes so many times later
_BLOCKS = 12
_LEAST = 3  # queries a block
_TREND = 29  # Kendall's S over 12 values exceeds it by chance in 5 of 100: 1.96 × sqrt(12 × 11 × 29 / 18)
_TOLERANCE = 0.02


def until_steady(queries: Iterator[scenarios.Query], limit_ms: float) -> dict[str, Any]:
    """Send queries until their times are steady, or for ``limit_ms``.

    Returns:
        ``steady`` (False when the limit came first), ``queries`` and ``ms`` that it took.
    """
    clock = time.monotonic_ns
    taken: list[int] = []
    block = scenarios.buffer()
    steady = False
    began = clock()
    limit, look = began + int(limit_ms * 1e6), began + _FIRST_LOOK
    while not steady and clock() < limit:
        end = scenarios.burst(queries, block, 1, min(limit, look))
        taken.extend(block[:end])
        if clock() >= min(limit, look):
            steady = is_steady(taken)
            look = began + int((clock() - began) * _LATER)
    return {"steady": steady, "queries": len(taken), "ms": (clock() - began) / 1e6}


def is_steady(taken: Sequence[int]) -> bool:
    """Tell whether times neither rise nor fall, the first quarter of them left out.

    The rest is cut into twelve blocks. It is steady unless the blocks' medians have a trend (Mann, "Nonparametric
    tests against trend", Econometrica 1945; at a level of 5 %) and their level moves by more than 2 %. Noise alone
    does not make it unsteady: that is for whoever reads the measurement.
    """
    rest = taken[len(taken) // 4 :]
    size = len(rest) // _BLOCKS
    if size < _LEAST:
        return False
    medians = [statistics.median(rest[i * size : (i + 1) * size]) for i in range(_BLOCKS)]
    trend = sum((later > earlier) - (later < earlier) for earlier, later in itertools.combinations(medians, 2))
    first, last = statistics.median(medians[: _BLOCKS // 3]), statistics.median(medians[-_BLOCKS // 3 :])
    return abs(trend) <= _TREND or abs(last - first) <= _TOLERANCE * first
