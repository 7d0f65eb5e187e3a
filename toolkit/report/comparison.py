"""Several runs, or the devices of one, side by side, with their Pareto front."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from toolkit.bench.distributions import wilson
from toolkit.report import latency, page, vega
from toolkit.report.vega import Spec, axis, layer, tooltip
from toolkit.store import Artifact


@dataclass(frozen=True)
class Entry:
    """One measurement among several.

    Attributes:
        label: A short name of the run or the device.
        document: The run's document, or that of a fleet's host beside what the whole fleet has in common.
        bench: Its ``bench`` artifact.
        recommended: Whether it is the one to ship.
        current: Whether the device runs it.
    """

    label: str
    document: Mapping[str, Any]
    bench: Artifact
    recommended: bool = False
    current: bool = False


def html(title: str, entries: Sequence[Entry], left_out: Sequence[str], library: str, lead: str = "") -> str:
    """Return a page that sets measurements side by side.

    Args:
        title: What is compared.
        entries: The measurements.
        left_out: What could not be compared, with the reason.
        library: JavaScript that draws the charts.
        lead: What follows from it, one sentence.
    """
    shown = tabulate(entries)
    specs: dict[str, tuple[Spec, str]] = {}
    if any(row["accuracy"] is not None and row["p50"]["value"] is not None for row in shown):
        caption = "With intervals; nothing is both faster and more accurate than what the line joins"
        if any(row["recommended"] for row in shown):
            caption += "; the recommended one has a ring"
        if any(row["current"] for row in shown):
            caption += "; the device's current release is a diamond"
        specs["pareto"] = (pareto(shown), caption)
    values = {
        entry.label: latency.by_scenario(latency.read(entry.bench)).get(entry.document["bench"]["scenario"])
        for entry in entries
    }
    curves = {name: some for name, some in values.items() if some is not None}
    if 0 < len(curves) <= len(vega.SERIES):
        specs["ecdf"] = (latency.ecdf(curves, vega.WIDTH), "How many queries were at most so slow")
    charts = {
        name: {
            "name": name,
            "caption": caption,
            "svg": Markup(vega.svg(spec, name)),
            "spec": page.data_of(json.dumps(spec, ensure_ascii=False)),
        }
        for name, (spec, caption) in specs.items()
    }
    return page.render(
        "comparison.html.j2",
        title=title,
        rows=shown,
        charts=charts,
        lead=lead,
        left_out=left_out,
        library=page.code_of(library),
    )


def tabulate(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return what the table and the front show of each measurement; more than four are numbered in the chart."""
    found = [_row(entry) for entry in entries]
    for number, row in enumerate(found, 1):
        row["front"] = row["accuracy"] is not None and not any(_dominates(other, row) for other in found)
        row["mark"] = str(number) if len(found) > 4 else row["label"]
    return found


def _row(entry: Entry) -> dict[str, Any]:
    bench, document = entry.document["bench"], entry.document
    accuracy, images = bench["accuracy"], bench["images"]
    low, high = (None, None) if accuracy is None else wilson(round(accuracy * images), images, bench["confidence"])
    return {
        "label": entry.label,
        "recommended": entry.recommended,
        "current": entry.current,
        "run": document,
        "bench": bench,
        "p50": bench["latency_ms"]["p50"],
        "p99": bench["latency_ms"]["p99"],
        "accuracy": accuracy,
        "low": low,
        "high": high,
    }


def _dominates(other: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether another measurement is at least as good in both, and better in one."""
    a, b = (
        (-(one["p50"]["value"] or float("inf")), -1.0 if one["accuracy"] is None else one["accuracy"])
        for one in (other, row)
    )
    return a[0] >= b[0] and a[1] >= b[1] and a != b


def pareto(rows: Sequence[Mapping[str, Any]]) -> Spec:
    """Return accuracy against median latency; what something else dominates is dimmed.

    Args:
        rows: ``label``, ``p50`` (a figure, ms), ``accuracy`` with ``low`` and ``high`` (0 to 1), ``front``,
            ``recommended``, ``current`` and ``mark``, the text beside the point.
    """
    copied = ("label", "mark", "accuracy", "low", "high", "front", "recommended", "current")
    points = [
        {
            "ms": row["p50"]["value"], "ms_low": row["p50"]["low"], "ms_high": row["p50"]["high"],
            **{key: row[key] for key in copied},
        }
        for row in rows
        if row["accuracy"] is not None and row["p50"]["value"] is not None
    ]  # fmt: skip
    x = axis("ms", "latency p50 (ms)", scale={"type": "linear", "zero": False, "nice": True, "padding": 24})
    y = axis("accuracy", "accuracy", scale={"zero": False, "nice": True, "padding": 12}, axis={"format": "~%"})
    seen = {
        "color": {"condition": {"test": "datum.front", "value": vega.AFTER}, "value": vega.BEFORE},
        "opacity": {"condition": {"test": "datum.front", "value": 1}, "value": 0.55},
    }
    shape = {"condition": {"test": "datum.current", "value": "diamond"}, "value": "circle"}
    says = tooltip(
        ("label", "run", None),
        ("ms", "p50 (ms)", ".4f"), ("ms_low", "at least", ".4f"), ("ms_high", "at most", ".4f"),
        ("accuracy", "accuracy", ".2%"), ("low", "at least", ".2%"), ("high", "at most", ".2%"),
    )  # fmt: skip
    rule = {"type": "rule", "strokeWidth": 1.5}
    ring: list[Spec] = []
    if any(point["recommended"] for point in points):  # an empty layer has no extent
        mark = {"type": "point", "size": 320, "strokeWidth": 2, "color": vega.INK}
        ring = [{"transform": [{"filter": "datum.recommended"}], "mark": mark, "encoding": {"x": x, "y": y}}]
    body = layer(
        vega.WIDTH,
        280,
        {
            "transform": [{"filter": "datum.front"}],
            "mark": {"type": "line", "interpolate": "step-after", "strokeDash": [4, 3], "color": vega.AFTER},
            "encoding": {"x": x, "y": y, "order": {"field": "ms"}},
        },
        {"mark": rule, "encoding": {"x": x | {"field": "ms_low"}, "x2": {"field": "ms_high"}, "y": y, **seen}},
        {"mark": rule, "encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, **seen}},
        *ring,
        {
            "mark": {"type": "point", "filled": True, "size": 90},
            "encoding": {"x": x, "y": y, "shape": shape, "tooltip": says, **seen},
        },
        {
            "mark": {"type": "text", "align": "left", "dx": 9, "dy": -9},
            "encoding": {"x": x, "y": y, "text": {"field": "mark"}, "opacity": seen["opacity"]},
        },
        data={"values": points},
    )
    return vega.chart("Accuracy against median latency; the Pareto front is a line", body)
