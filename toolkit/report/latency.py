"""Charts of raw latencies, reduced to what a screen can show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.report import telemetry, vega
from toolkit.report.vega import Spec, axis, layer, series, tooltip
from toolkit.store import Artifact

_GROUPS, _SLOWEST, _BINS, _STEPS = 300, 60, 70, 400
_GROUP = 10  # queries that a median and its spread are taken of, at least

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Queries:
    """A scenario's queries in one round.

    Attributes:
        seconds: When each began, since the measurement did, ``(N,)``.
        milliseconds: How long each took, ``(N,)``.
    """

    scenario: str
    round: int
    seconds: Values
    milliseconds: Values


def read(bench: Artifact) -> list[Queries]:
    """Read the raw latencies of the scenarios with single queries, the one that is judged first."""
    rounds = bench.meta["rounds"]
    start = telemetry.start(rounds)
    found = []
    for number, measured in enumerate(rounds):
        for entry in measured["scenarios"]:
            if entry["name"] == "Offline":
                continue
            taken = np.load(bench.file(entry["file"]))
            if not len(taken):
                continue
            if "period_ms" in entry:
                began = np.arange(len(taken)) * entry["period_ms"] * 1e6
            else:  # one after another: what lies between two queries is spread evenly
                ends = np.cumsum(taken)
                began = (ends - taken) * ((entry["ended_ns"] - entry["began_ns"]) / ends[-1])
            found.append(Queries(entry["name"], number, (entry["began_ns"] - start + began) / 1e9, taken / 1e6))
    return sorted(found, key=lambda part: part.scenario != bench.meta["scenario"])


def by_scenario(queries: Iterable[Queries]) -> dict[str, Values]:
    """Return all latencies of each scenario, in ms."""
    found = defaultdict(list)
    for part in queries:
        found[part.scenario].append(part.milliseconds)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def histogram(latencies: Mapping[str, Values], scenarios: Mapping[str, Any]) -> Spec:
    """Return how often each latency was seen, with the percentiles and their intervals."""
    rows, notes = [], []
    for name, values in latencies.items():
        low, high = _shown(values)
        counts, edges = np.histogram(values, _BINS, (low, high))
        shares = counts / len(values)
        rows += [
            {
                "scenario": name,
                "from": vega.short(a),
                "to": vega.short(b),
                "share": vega.short(share),
                "queries": int(count),
            }
            for a, b, share, count in zip(edges, edges[1:], shares, counts, strict=False)
            if count
        ]
        beyond = int(np.count_nonzero(values > high))
        if beyond:
            notes.append({"scenario": name, "text": f"{beyond:,} of {len(values):,} lie beyond"})
    x = axis("from", "ms", scale={"zero": False, "nice": False}, axis={"format": "~g"})
    bars = {
        "mark": {"type": "rect", "color": vega.AFTER, "stroke": vega.PAPER, "strokeWidth": 0.5},
        "encoding": {
            "x": x,
            "x2": {"field": "to"},
            "y": axis("share", "share of queries", axis={"format": "~%"}),
            "y2": {"datum": 0},
            "tooltip": tooltip(
                ("from", "from (ms)", ".4f"),
                ("to", "to (ms)", ".4f"),
                ("queries", "queries", ","),
                ("share", "share", ".2%"),
            ),
        },
    }
    text = {
        "data": {"values": notes},
        "mark": {"type": "text", "align": "right", "color": vega.SOFT, "x": "width", "y": -8},
        "encoding": {"text": {"field": "text"}},
    }
    body = layer(
        vega.HALF, 210, bars, *_marks(scenarios, latencies), *([text] if notes else []), data={"values": rows}
    )
    if len(latencies) > 1:
        names = list(latencies)
        bind = {"input": "radio", "options": names, "name": " "}
        body["params"] = [{"name": "scenario", "value": names[0], "bind": bind}]
        for part in body["layer"]:
            part["transform"] = [{"filter": "datum.scenario === scenario"}]
    return vega.chart("Histogram of latency with its percentiles", body)


def ecdf(latencies: Mapping[str, Values], width: int = vega.HALF) -> Spec:
    """Return the share of queries that were at most so slow."""
    rows = []
    for name, values in latencies.items():
        ordered = np.sort(values)
        count = len(ordered)
        # evenly, and closer together in the tail, where the last percent is
        tail = count - np.unique(np.geomspace(1, count, _STEPS // 2).astype(int))
        picked = np.unique(np.concatenate([np.linspace(0, count - 1, _STEPS // 2).astype(int), tail]))
        rows += [
            {"scenario": name, "ms": vega.short(ordered[i]), "share": vega.short((i + 1) / count)}
            for i in picked.tolist()
        ]
    high = max(_shown(values)[1] for values in latencies.values())
    names = list(latencies)
    scale = {"type": "linear", "zero": False, "nice": False, "domainMax": vega.short(high)}
    line: Spec = {
        "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 2, "clip": True, "tooltip": True},
        "encoding": {
            "x": axis("ms", "ms", scale=scale, axis={"format": "~g"}),
            "y": axis("share", "queries at most so slow", axis={"format": "~%"}),
            "color": series("scenario", names),
            "tooltip": tooltip(
                ("scenario", "scenario", None), ("ms", "latency (ms)", ".4f"), ("share", "queries", ".3%")
            ),
        },
    }
    near = {"type": "point", "on": "pointermove", "nearest": True, "clear": "pointerout"}
    shown = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    nearest = vega.hover(
        "nearest",
        {"type": "point", "size": 60},
        line["encoding"] | {"opacity": shown},
        params=[{"name": "near", "select": near}],
    )
    body = layer(width, 210, line, nearest, data={"values": rows}, **vega.switches(names, "scenario"))
    return vega.chart("Share of queries that were at most so slow, against latency", body)


def _marks(scenarios: Mapping[str, Any], shown: Mapping[str, Values]) -> list[Spec]:
    """Return a line at each percentile, its interval behind it and its name beside it."""
    rows = []
    for name, values in shown.items():
        least, most = _shown(values)
        for place, percentile in enumerate(("p50", "p90", "p99")):
            figure = scenarios[name]["latency_ms"][percentile]
            if figure["value"] is not None:
                rows.append({"scenario": name, "name": percentile, "height": 4 + 15 * place, **figure})
                if figure["low"] is not None:
                    rows[-1] |= {"begin": max(least, figure["low"]), "end": min(most, figure["high"])}
    data = {"data": {"values": rows}}
    says = tooltip(
        ("name", "percentile", None), ("value", "ms", ".4f"), ("low", "at least", ".4f"), ("high", "at most", ".4f")
    )
    x = {"field": "value", "type": "quantitative"}
    return [
        data | {
            "mark": {"type": "rect", "color": vega.INK, "opacity": 0.15, "clip": True},
            "encoding": {"x": x | {"field": "begin"}, "x2": {"field": "end"}, "tooltip": says},
        },
        data | {
            "mark": {"type": "rule", "strokeDash": [3, 3], "clip": True},
            "encoding": {"x": x, "tooltip": says},
        },
        data | {
            "mark": {
                "type": "text", "baseline": "top", "clip": True,
                "align": {"expr": "datum.name === 'p99' ? 'right' : 'left'"},
                "dx": {"expr": "datum.name === 'p99' ? -4 : 4"},
            },
            "encoding": {
                "x": x, "y": {"field": "height", "type": "quantitative", "scale": None}, "text": {"field": "name"},
            },
        },
    ]  # fmt: skip


def over_time(queries: list[Queries], bench: Artifact) -> Spec:
    """Return latency against time, with clocks and temperature beneath on the same axis."""
    names = list(dict.fromkeys(part.scenario for part in queries))
    total = sum(len(part.milliseconds) for part in queries)
    groups, slowest = [], []
    for part in queries:
        label = {"scenario": part.scenario, "part": f"{part.scenario} {part.round}"}
        taken = len(part.milliseconds)
        count = max(1, min(round(_GROUPS * taken / total), taken // _GROUP))
        for some in np.array_split(np.arange(taken), count):
            low, middle, high = np.percentile(part.milliseconds[some], (5, 50, 95))
            when = {"s": vega.short(part.seconds[some].mean()), "queries": len(some)}
            groups.append(
                label | when | {"low": vega.short(low), "ms": vega.short(middle), "high": vega.short(high)}
            )
        for i in np.argsort(part.milliseconds)[-max(1, _SLOWEST // len(queries)) :]:
            when = {"s": vega.short(part.seconds[i]), "top": vega.short(part.milliseconds[i])}
            slowest.append({"scenario": part.scenario, **when})
    beneath = telemetry.read(bench, telemetry.BENEATH)
    end = max([float(part.seconds[-1]) for part in queries] + [row["s"] for _, _, rows in beneath for row in rows])
    x = telemetry.time_axis(end, last=not beneath)
    scale = {"type": "linear", "zero": False, "nice": True}
    colors = {"x": x, "color": series("scenario", names)}
    latency = layer(
        vega.WIDTH,
        200,
        {
            "mark": {"type": "area", "opacity": 0.25, "clip": True},
            "encoding": {
                **colors, "detail": {"field": "part"},
                "y": axis("low", "latency (ms)", scale=scale), "y2": {"field": "high"},
            },
        },
        {
            "mark": {"type": "line", "strokeWidth": 1.2, "clip": True},
            "encoding": {**colors, "detail": {"field": "part"}, "y": axis("ms", "latency (ms)", scale=scale)},
        },
        vega.hover(
            "groups",
            {"type": "point", "size": 40, "opacity": 0},
            {
                "x": x, "y": axis("ms", "latency (ms)", scale=scale),
                "tooltip": tooltip(
                    ("scenario", "scenario", None), ("s", "second", ".2f"), ("ms", "median (ms)", ".4f"),
                    ("low", "5 %", ".4f"), ("high", "95 %", ".4f"), ("queries", "queries", ","),
                ),
            },
        ),
        {
            "data": {"values": slowest},
            "mark": {"type": "point", "size": 14, "strokeWidth": 1, "opacity": 0.8, "clip": True},
            "encoding": {
                **colors, "y": axis("top", "latency (ms)", scale=scale),
                "tooltip": tooltip(
                    ("scenario", "one of the slowest", None), ("s", "second", ".3f"), ("top", "ms", ".4f")
                ),
            },
        },
        data={"values": groups},
    )  # fmt: skip
    latency["layer"][1]["params"] = vega.zoom()
    return vega.chart(
        "Latency while it was measured, with clocks and temperature beneath",
        {
            "vconcat": [latency, *telemetry.strips(beneath, end)],
            "spacing": 26,
            "resolve": {"scale": {"x": "shared", "color": "independent"}},
        },
    )


def throughput(batches: list[Mapping[str, Any]]) -> Spec:
    """Return samples a second by batch, with intervals."""
    rows = [
        {"batch": str(row["batch"]), **row["samples_per_s"]} for row in batches if row["samples_per_s"]["value"]
    ]
    y = axis("batch", "batch", "ordinal", sort=None, axis={"titleAnchor": "end", "grid": False})
    says = tooltip(
        ("batch", "batch", None),
        ("value", "samples/s", ",.0f"),
        ("low", "at least", ",.0f"),
        ("high", "at most", ",.0f"),
    )
    x = axis("value", "samples/s", scale={"zero": True})
    body = layer(
        vega.WIDTH,
        max(40, 26 * len(rows)),
        {
            "mark": {"type": "bar", "color": vega.AFTER, "height": {"band": 0.6}, "opacity": 0.85},
            "encoding": {"x": x, "y": y, "tooltip": says},
        },
        {
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}, "y": y},
        },
        data={"values": rows},
    )
    return vega.chart("Throughput by batch, with intervals", body)


def _shown(values: Values) -> tuple[float, float]:
    """Return the range that a picture shows: all but the slowest half percent."""
    low, high = float(values.min()), float(np.percentile(values, 99.5))
    return (low, high) if high > low else (low, low * 1.01 + 1e-6)
