"""Charts of what a device said of itself while it was measured."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.report import vega
from toolkit.report.vega import Spec, axis, layer, series, tooltip
from toolkit.store import Artifact

BENEATH = ("clock", "temperature")  # the kinds that stand beneath latency
_KINDS = {
    "clock": "clocks", "temperature": "temperature", "power": "power", "energy": "energy", "memory": "memory",
    "load": "load", "throttle": "throttling", "steal": "taken by neighbours", "fan": "fan",
}  # fmt: skip
_FEW, _POINTS = 4, 400  # channels of a kind that are shown one by one, and points of each


def start(rounds: Iterable[Mapping[str, Any]]) -> int:
    """Return when the first query of all rounds began, in nanoseconds of the device's clock."""
    return min(int(entry["began_ns"]) for measured in rounds for entry in measured["scenarios"])


def chart(bench: Artifact) -> Spec | None:
    """Return what the device said of itself beside clocks and temperature; None where it said nothing."""
    found = read(bench, [kind for kind in _KINDS if kind not in BENEATH])
    if not found:
        return None
    end = max(row["s"] for _, _, rows in found for row in rows)
    body = {
        "vconcat": strips(found, end),
        "spacing": 26,
        "resolve": {"scale": {"x": "shared", "color": "independent"}},
    }
    return vega.chart("Power, memory, load and what else the device said of itself while it was measured", body)


def time_axis(end: float, *, last: bool) -> Spec:
    """Return the axis of seconds since the measurement began; only the lowest of several has labels."""
    labels = {} if last else {"labels": False}
    title = "seconds since the measurement began" if last else None
    return axis("s", title, scale={"domain": [0, vega.short(end)], "nice": False}, axis={"grid": False, **labels})


def strips(channels: list[tuple[str, str, list[Spec]]], end: float) -> list[Spec]:
    """Return a low chart for each kind of channel, as :func:`read` returns them, up to ``end`` seconds."""
    strips = []
    for number, (kind, unit, rows) in enumerate(channels):
        names = list(dict.fromkeys(row["channel"] for row in rows))
        encoding = {
            "x": time_axis(end, last=number == len(channels) - 1),
            "y": axis(
                "value",
                f"{_KINDS[kind]} ({unit})" if unit else _KINDS[kind],
                scale={"zero": False, "nice": True},
                axis={"tickCount": 3},
            ),
            "color": series("channel", names, vega.SERIES[1:]),
        }
        says = tooltip(("channel", "channel", None), ("s", "second", ".1f"), ("value", unit or "value", ",.4~g"))
        strip = layer(
            vega.WIDTH,
            64,
            {
                "mark": {"type": "line", "strokeWidth": 1.3, "clip": True},
                "encoding": encoding | {"detail": {"field": "round"}},
            },
            vega.hover(f"{kind} {unit}", {"type": "point", "size": 50, "opacity": 0}, encoding | {"tooltip": says}),
            data={"values": rows},
        )
        if number == 0 and kind not in BENEATH:
            strip["layer"][0]["params"] = vega.zoom()
        strips.append(strip)
    return strips


def read(bench: Artifact, kinds: Iterable[str]) -> list[tuple[str, str, list[Spec]]]:
    """Return kind, unit and rows of each kind that the device has; of many channels least, middle, largest."""
    began = start(bench.meta["rounds"])
    found: dict[tuple[str, str], list[Spec]] = defaultdict(list)
    for number, measured in enumerate(bench.meta["rounds"]):
        if not measured["telemetry"]:
            continue
        told = json.loads(bench.file(measured["telemetry"]).read_text(encoding="utf-8"))
        seconds = (np.array(told["times_ns"], np.float64) - began) / 1e9
        for kind in kinds:
            units = dict.fromkeys(c["unit"] for c in told["channels"] if c["kind"] == kind)
            for unit in units:
                channels = [c for c in told["channels"] if (c["kind"], c["unit"]) == (kind, unit)]
                names, values = _few(channels)
                every = max(1, -(-len(seconds) // _POINTS))
                found[kind, unit] += [
                    {"channel": name, "round": number, "s": vega.short(second), "value": vega.short(value)}
                    for name, column in zip(names, values, strict=True)
                    for second, value in zip(seconds[::every], column[::every], strict=True)
                    if second >= 0 and not np.isnan(value)
                ]
    return [(kind, unit, rows) for (kind, unit), rows in found.items() if rows]


def _few(channels: list[Mapping[str, Any]]) -> tuple[list[str], NDArray[np.float64]]:
    """Return a few curves of channels of the same kind, ``(channels, samples)``; NaN where nothing was read."""
    values = np.array([c["values"] for c in channels], np.float64)
    if len(channels) <= _FEW:
        return [str(c["name"]) for c in channels], values
    known = ~np.isnan(values).all(axis=0)
    curves = np.full((3, values.shape[1]), np.nan)
    curves[:, known] = np.nanpercentile(values[:, known], (0, 50, 100), axis=0)
    return [f"{what} of {len(channels)}" for what in ("least", "middle", "largest")], curves
