"""Power while single queries were running, and what one of them costs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.bench.intervals import mean, scaled
from toolkit.bench.series import Channel, Run

# what comes closest to the whole device, first, by source and name; channels of the same pattern are added up
_TOTALS = (
    (r"tegrastats (VDD_IN|POM_5V_IN|VIN) power", "the board's input"),
    (r"tegrastats (VDD_GPU_SOC|VDD_CPU_CV|VIN_SYS_5V0) power", "the module's rails together"),
    (r"NVML .* power|RAPL .*package.* energy", "GPU boards and CPU packages, without the rest of the machine"),
)


def power(runs: Sequence[Run], confidence: float) -> dict[str, Any] | None:
    """Return mean power and energy a query.

    Args:
        runs: SingleStream of every round.
        confidence: Of the intervals, 0 to 1.

    Returns:
        ``watts`` and ``energy_mj`` (power times duration, shared among the queries) as figures, and ``source``;
        None where the device told of no power, or hardly.
    """
    for pattern, what in _TOTALS:
        names = {c.name for run in runs for c in run.channels if re.fullmatch(pattern, f"{c.source} {c.name}")}
        rounds = [_watts(run, names) for run in runs] if names else []
        if sum(map(len, rounds)) >= 2:
            watts = mean([part for part in rounds if len(part)], confidence)
            share = sum(run.seconds for run in runs) / sum(len(run.series) for run in runs)
            return {
                "watts": scaled(watts, 1),
                "energy_mj": scaled(watts, 1e3 * share),
                "source": f"{what}: {' + '.join(sorted(names))}",
            }
    return None


def _watts(run: Run, names: set[str]) -> NDArray[np.float64]:
    """Return the sum of some channels over time, watts ``(N,)``; empty where one of them is missing."""
    parts = [_of_channel(channel) for channel in run.channels if channel.name in names]
    if len(parts) < len(names):
        return np.empty(0)
    shortest = min(map(len, parts))
    total: NDArray[np.float64] = np.sum([part[:shortest] for part in parts], axis=0)
    return total


def _of_channel(channel: Channel) -> NDArray[np.float64]:
    if channel.kind == "power":
        return channel.values
    joules, seconds = np.diff(channel.values), np.diff(channel.times) / 1e9
    return joules[joules >= 0] / seconds[joules >= 0]  # a counter that began anew tells nothing of that moment
