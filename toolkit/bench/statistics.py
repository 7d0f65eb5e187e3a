"""Statistics of raw latencies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50, 90, 99)
_CONFIDENCE = 0.95


def samples_needed(percentile: float) -> int:
    """Return how many samples a percentile needs, so that some lie above it with 95 % confidence.

    With fewer, not even the largest sample bounds the percentile (order statistics: ``1 - p^n >= 0.95``).
    """
    return math.ceil(math.log(1 - _CONFIDENCE) / math.log(percentile / 100))


def summarise(latencies: NDArray[np.int64]) -> dict[str, float | None]:
    """Return percentiles, mean, min and max in milliseconds.

    Args:
        latencies: Nanoseconds a query, int64 ``(N,)``.

    Returns:
        ``p50``, ``p90``, ``p99`` (None where the samples do not support it), ``mean``, ``min``, ``max``.
    """
    values = latencies / 1e6
    found: dict[str, float | None] = {
        f"p{p}": round(float(np.percentile(values, p)), 6) if len(values) >= samples_needed(p) else None
        for p in PERCENTILES
    }
    return found | {
        "mean": round(float(values.mean()), 6),
        "min": round(float(values.min()), 6),
        "max": round(float(values.max()), 6),
    }


def load(path: Path) -> NDArray[np.int64]:
    """Read the latencies that the agent wrote: int64 nanoseconds, in order of measurement."""
    latencies: NDArray[np.int64] = np.load(path)
    return latencies
