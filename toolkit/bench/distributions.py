"""The few distributions that intervals are made of, in NumPy: an unchanged run never loads SciPy."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_GRID = 20_001


def normal_quantile(confidence: float) -> float:
    """Return z with ``P(-z <= Z <= z) = confidence``: 1.96 for 0.95."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


@functools.lru_cache(maxsize=1024)
def t_quantile(confidence: float, freedom: float) -> float:
    """Return t with ``P(-t <= T <= t) = confidence`` for Student's T; ``freedom`` >= 1 need not be whole.

    With ``T = sqrt(freedom) tan(angle)`` the density becomes ``cos(angle) ** (freedom - 1)`` on a finite range.
    """
    if freedom > 1e4:  # the two differ by less than 1e-4, and the grid would become too coarse
        return normal_quantile(confidence)
    angles = np.linspace(0, math.pi / 2, _GRID)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(confidence, mass / mass[-1], angles)))


def binomial_cdf(n: int, p: float) -> tuple[int, NDArray[np.float64]]:
    """Return the distribution function of Binomial(n, p) where it is neither 0 nor 1.

    Returns:
        The first k, and ``P(B <= k), P(B <= k + 1), ...`` from there, float64; what lies outside is below 1e-20.
    """
    reach = 10 * math.sqrt(n * p * (1 - p)) + 50
    first, last = max(0, math.floor(n * p - reach)), min(n, math.ceil(n * p + reach))
    k = np.arange(first, last)
    logs = np.concatenate([[0.0], np.cumsum(np.log((n - k) / (k + 1) * (p / (1 - p))))])
    mass = np.exp(logs - logs.max())
    return first, np.cumsum(mass) / mass.sum()


def order_statistics(n: int, p: float, confidence: float) -> tuple[int, int] | None:
    """Return the ranks (from 1) of the two of n independent samples that enclose the quantile p.

    The number of samples up to the quantile is Binomial(n, p), whatever they are distributed like (David and
    Nagaraja, Order Statistics, 2003, 7.1). Each side fails with at most ``(1 - confidence) / 2``. None where n
    samples are too few for that: see :func:`samples_needed`.
    """
    if n < samples_needed(p, confidence):
        return None
    first, below = binomial_cdf(n, p)
    tail = (1 - confidence) / 2
    low = first + int(np.searchsorted(below, tail, side="right"))
    high = first + int(np.searchsorted(below, 1 - tail, side="left")) + 1
    return low, min(high, n)


def samples_needed(p: float, confidence: float) -> int:
    """Return how many independent samples it takes to have the quantile p enclosed by two of them."""
    return math.ceil(math.log((1 - confidence) / 2) / math.log(max(p, 1 - p)))


def wilson(hits: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the interval of a share of which ``hits`` of ``n`` were seen (Wilson, JASA 1927)."""
    z = normal_quantile(confidence)
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(lost: int, gained: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the interval of a drop of accuracy on the same n images.

    Agresti and Min's adjusted Wald interval (Statistics in Medicine, 2005): half an image is added to each of the
    four cells of right and wrong before and after.

    Args:
        lost: Images right before and wrong after.
        gained: Images wrong before and right after.
        n: Images in all.
        confidence: Of the interval, 0 to 1.
    """
    b, c, total = lost + 0.5, gained + 0.5, n + 2
    centre = (b - c) / total
    half = normal_quantile(confidence) * math.sqrt(b + c - (b - c) ** 2 / total) / total
    return centre - half, centre + half
