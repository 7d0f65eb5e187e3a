"""What one process of the agent measured in one scenario: its series, and the telemetry of that time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Channel:
    """One thing that was sampled beside the measurement: ``times`` in ns and ``values``, without gaps."""

    name: str
    kind: str
    unit: str
    source: str
    times: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """A scenario of one round.

    Attributes:
        entry: What the agent said of it.
        series: Nanoseconds a query (Offline: a batch), int64 ``(N,)``, in order.
        channels: Telemetry between its begin and its end; may be empty.
    """

    entry: Mapping[str, Any]
    series: NDArray[np.int64]
    channels: Sequence[Channel]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return float(self.entry["ended_ns"] - self.entry["began_ns"]) / 1e9

    def of_kind(self, kind: str) -> list[Channel]:
        """Return the channels of a kind."""
        return [channel for channel in self.channels if channel.kind == kind]


def read(folder: Path, rounds: Sequence[Mapping[str, Any]]) -> Iterator[Run]:
    """Yield every scenario of every round; file names are relative to ``folder``."""
    for entry in rounds:
        telemetry = json.loads((folder / entry["telemetry"]).read_text()) if entry["telemetry"] else None
        for scenario in entry["scenarios"]:
            channels = _during(telemetry, scenario) if telemetry else []
            yield Run(scenario, np.load(folder / scenario["file"]), channels)


def _during(telemetry: Mapping[str, Any], scenario: Mapping[str, Any]) -> list[Channel]:
    times = np.array(telemetry["times_ns"], np.int64)
    inside = (times >= scenario["began_ns"]) & (times <= scenario["ended_ns"])
    found = []
    for told in telemetry["channels"]:
        values = np.array(told["values"], np.float64)  # null becomes not a number
        there = inside & ~np.isnan(values)
        if there.any():
            about = {key: told[key] for key in ("name", "kind", "unit", "source")}
            found.append(Channel(**about, times=times[there], values=values[there]))
    return found
