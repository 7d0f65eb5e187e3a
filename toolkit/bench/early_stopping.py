"""MLPerf's early stopping, a second opinion on percentiles that takes samples for independent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from toolkit.bench.distributions import binomial_cdf, normal_quantile

_CONFIDENCE = 0.99
_ROUNDED_TO = 2**13


def estimates(rounds: Sequence[NDArray[np.int64]], percentiles: Sequence[int]) -> dict[str, float | None]:
    """Return LoadGen's early-stopping estimates, ``{"p90": milliseconds}``; None below its least number of queries.

    It is the t-th largest latency, t the most with ``P(Binomial(n, 1 - p) <= t) < 0.01``: an upper bound of the
    percentile at 99 % (mlcommons/inference, ``loadgen/early_stopping.cc`` and ``results.cc``). It takes a t of 1,
    hence at least 64 queries for p90.

    Args:
        rounds: Nanoseconds a query, int64 ``(N,)`` each.
        percentiles: Which ones, 0 to 100.
    """
    ordered = np.sort(np.concatenate(rounds))
    found: dict[str, float | None] = {}
    for p in percentiles:
        first, within = binomial_cdf(len(ordered), 1 - p / 100)
        discarded = first + int(np.searchsorted(within, 1 - _CONFIDENCE, side="left")) - 1
        found[f"p{p}"] = round(ordered[-discarded] / 1e6, 6) if discarded >= 1 else None
    return found


def queries_for(percentile: float, margin: float | None = None, confidence: float = _CONFIDENCE) -> tuple[int, int]:
    """Return how many queries MLPerf asks for, as computed and rounded up to a multiple of 8,192.

    Args:
        percentile: 0 to 100.
        margin: Of the share of queries within the percentile; MLPerf's own, a twentieth of the tail, by default.
        confidence: That the share lies within the margin.
    """
    tail = 1 - percentile / 100
    margin = tail / 20 if margin is None else margin
    queries = round(normal_quantile(confidence) ** 2 * tail * (1 - tail) / margin**2)
    return queries, math.ceil(queries / _ROUNDED_TO) * _ROUNDED_TO
