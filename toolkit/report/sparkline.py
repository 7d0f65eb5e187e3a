"""A small picture of latencies for a terminal."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BARS = " ▁▂▃▄▅▆▇█"


def picture(latencies: NDArray[np.float64], width: int = 48) -> str:
    """Return a histogram of latencies with a line beneath that says where p50, p90 and p99 lie.

    Args:
        latencies: Milliseconds, ``(N,)``, N at least 1. The slowest half percent is left out of the picture.
        width: Characters.

    Returns:
        Two lines: the bars between the least and the largest shown, and the marks.
    """
    low, high = float(np.min(latencies)), float(np.percentile(latencies, 99.5))
    if high <= low:
        return f"{low:.3f} ms every time"
    counts, _ = np.histogram(latencies, width, (low, high))
    heights = np.ceil(counts / counts.max() * (len(_BARS) - 1)).astype(int)
    bars = "".join(_BARS[height] for height in heights)
    marks = ""
    for percentile in (50, 90, 99):
        place = min(width - 1, int((float(np.percentile(latencies, percentile)) - low) / (high - low) * width))
        if place >= len(marks):  # where two meet, the lower one is seen
            marks = f"{marks:<{place}}╵p{percentile}"
    return f"{low:.3f} ms {bars} {high:.3f} ms\n{' ' * len(f'{low:.3f} ms ')}{marks}"
