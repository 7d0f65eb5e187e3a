"""Percentiles and means with intervals, from series whose samples depend on each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.bench.distributions import normal_quantile, order_statistics, samples_needed, t_quantile

METHOD = (
    "percentiles: binomial order statistics at the effective sample size (batch means of exceedances); "
    "means: batch means; both widened by differences between rounds (random effects, Satterthwaite)"
)
# Schmeiser, Batch size effects in the analysis of simulation output, Operations Research 1982: 10 to 30 serve
_BATCHES = 20

Figure = dict[str, Any]
Series = NDArray[Any]


def figure(value: float | None, low: float | None, high: float | None, needs: int | None = None) -> Figure:
    """Return a value with its interval; without a value, ``needs`` says how many samples would support one."""
    return {"value": value, "low": low, "high": high, "needs": needs}


def scaled(entry: Figure, factor: float) -> Figure:
    """Return a figure in another unit, rounded to six digits after the point."""
    values = {
        key: None if entry[key] is None else round(entry[key] * factor, 6) for key in ("value", "low", "high")
    }
    return values | {"needs": entry["needs"]}


def percentile(rounds: Sequence[Series], p: float, confidence: float, ordered: Series | None = None) -> Figure:
    """Return a percentile, with the interval that the samples support.

    The interval ends at two of the samples, whose ranks come from the binomial distribution at the effective sample
    size (see :func:`effective`). How far the rounds' own percentiles lie apart, beyond what one round's samples
    explain, widens it.

    Args:
        rounds: Series in order of measurement, ``(N,)`` each, one a process.
        p: 0 to 100.
        confidence: 0 to 1.
        ordered: All of them, sorted, where that is at hand.

    Returns:
        A figure in the series' unit; no value where the samples do not reach both ends of the interval.
    """
    if ordered is None:
        ordered = np.sort(np.concatenate(rounds))
    n, worth = len(ordered), effective(rounds, p, confidence)
    ranks = order_statistics(worth, p / 100, confidence)
    if ranks is None:
        return figure(None, None, None, math.ceil(samples_needed(p / 100, confidence) * n / max(worth, 1)))
    low = float(ordered[max(math.floor(ranks[0] * n / worth), 1) - 1])
    high = float(ordered[min(math.ceil(ranks[1] * n / worth), n) - 1])
    value = float(np.percentile(ordered, p))
    error = (high - low) / 2 / normal_quantile(confidence)
    return _between_rounds(value, low, high, error, [float(np.percentile(part, p)) for part in rounds], confidence)


def mean(rounds: Sequence[Series], confidence: float) -> Figure:
    """Return the mean with the interval of its batch means; no interval from a single sample."""
    n = sum(len(part) for part in rounds)
    centre = sum(float(part.sum()) for part in rounds) / n
    if n < 2:
        return figure(centre, None, None)
    spread = sum(float(((part - part.mean()) ** 2).sum()) for part in rounds) / n
    error = math.sqrt(spread * inflation(rounds, confidence) / n)
    half = normal_quantile(confidence) * error
    own = [float(part.mean()) for part in rounds]
    return _between_rounds(centre, centre - half, centre + half, error, own, confidence)


def effective(rounds: Sequence[Series], p: float, confidence: float) -> int:
    """Return how many independent samples the samples are worth where the percentile p is concerned.

    What counts is which samples exceed it: each round's own percentile, so that differences between rounds, which
    widen the interval on their own account, do not count twice.
    """
    exceed = [(part > np.percentile(part, p)).astype(np.float64) for part in rounds]
    return int(sum(len(part) for part in rounds) / inflation(exceed, confidence))


def inflation(rounds: Sequence[Series], confidence: float) -> float:
    """Return by what the variance of the mean exceeds that of independent samples, at least 1.

    Each round is cut into 20 consecutive batches; what their means vary by is held against what independent samples
    would have them vary by. That few batches say so is made good by Student's t in the normal distribution's place.
    """
    ratios, freedom = [], []
    for part in rounds:
        count = min(_BATCHES, len(part))
        spread = float(part.var())
        if count < 2 or spread == 0:
            continue
        edges = np.linspace(0, len(part), count + 1).astype(int)
        means = np.add.reduceat(part, edges[:-1]) / np.diff(edges)
        ratios.append(float(means.var(ddof=1)) * len(part) / count / spread)
        freedom.append(count - 1)
    if not ratios:
        return 1.0
    widening = t_quantile(confidence, sum(freedom)) / normal_quantile(confidence)
    return max(1.0, float(np.average(ratios, weights=freedom)) * widening**2)


def _between_rounds(
    value: float, low: float, high: float, error: float, rounds: Sequence[float], confidence: float
) -> Figure:
    """Widen an interval by what rounds differ beyond what each one's samples explain.

    A random effect a round: its variance is what the rounds' own values vary by less what they should, its degrees
    of freedom are Satterthwaite's (Biometrics Bulletin, 1946).
    """
    count = len(rounds)
    excess = float(np.var(rounds, ddof=1)) / count - error**2 if count > 1 else 0.0
    if excess <= 0:
        return figure(value, low, high)
    variance = error**2 + excess
    freedom = (count - 1) * (variance / excess) ** 2
    all_in_all = t_quantile(confidence, freedom) ** 2 * variance
    extra = math.sqrt(max(0.0, all_in_all - (normal_quantile(confidence) * error) ** 2))
    return figure(value, max(0.0, value - math.hypot(value - low, extra)), value + math.hypot(high - value, extra))
