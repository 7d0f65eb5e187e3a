"""All that a page needs beside the run's document: charts, as specification and as SVG, and images."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from toolkit.report import latency, networks, sparkline, telemetry, vega
from toolkit.report.page import DETAILS, LIBRARY
from toolkit.report.vega import Spec
from toolkit.store import Artifact, write_json

INPUTS = ("data", "train", "prune", "finetune", "bench")  # stages whose artifacts a page is made from
_IMAGES, _PIXELS = 24, 96

_CAPTIONS = {
    "widths": "Channels of each layer before and after pruning",
    "training": "Validation accuracy by epoch; pruning lies where the colour changes",
    "ecdf": "How many queries were at most so slow",
    "histogram": "How often each latency was seen, with percentiles (dashed) and their intervals (grey)",
    "throughput": "Offline: samples a second by batch, with intervals",
    "over-time": "Median (line), 5 to 95 % (area) and the slowest queries (circles); "
    "drag to move, Ctrl and the wheel to zoom, double click to go back",
    "telemetry": "What else the device said of itself meanwhile",
    "staircase": "Each layer's share of time against its share of FLOPs; "
    "✱ misses the multiple of channels that the hardware computes at once",
    "confusion": "What each class was taken for, by the release on the device",
}  # fmt: skip


def draw(out: Path, made: Mapping[str, Artifact], cache: Path) -> dict[str, Any]:
    """Write a specification and an SVG a chart, what tables need (``details.json``), and the library (``vega.js``).

    Args:
        out: Where to.
        made: The artifacts that there are of ``INPUTS``, at least ``bench``.
        cache: Folder that keeps the library.

    Returns:
        ``charts``: name → caption of each chart that the data allow. ``picture``: latencies for a terminal, empty
        where no single query was timed.
    """
    bench = made["bench"]
    attribution = _read(bench, "attribution.json")
    staircase = _read(bench, "staircase.json")
    values = latency.by_scenario(latency.read(bench))
    specs = _specs(made, attribution, staircase)
    for name, spec in specs.items():
        (out / f"{name}.svg").write_text(vega.svg(spec, name), encoding="utf-8")
        (out / f"{name}.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    (out / LIBRARY).write_text(vega.library(cache), encoding="utf-8")
    gallery = _gallery(made["data"], attribution) if attribution and "data" in made else []
    notes = [
        note
        for measured in bench.meta["rounds"]
        if measured["telemetry"]
        for note in (_read(bench, measured["telemetry"]) or {})["notes"]
    ]
    details = {
        "attribution": attribution,
        "staircase": staircase,
        "gallery": gallery,
        "telemetry_notes": list(dict.fromkeys(notes)),
    }
    write_json(out / DETAILS, details)
    judged = values.get(bench.meta["scenario"])
    picture = "" if judged is None else sparkline.picture(judged)
    return {"charts": {name: _CAPTIONS[name] for name in specs}, "picture": picture}


def _specs(
    made: Mapping[str, Artifact], attribution: dict[str, Any] | None, staircase: dict[str, Any] | None
) -> dict[str, Spec]:
    bench = made["bench"]
    specs: dict[str, Spec | None] = {}
    if "prune" in made and made["prune"].meta["widths"]:
        specs["widths"] = networks.widths(made["prune"].meta["widths"])
    if "train" in made and "finetune" in made:
        train, tune = made["train"].meta["history"], made["finetune"].meta["history"]
        specs["training"] = networks.training(train, tune) if train or tune else None
    if queries := latency.read(bench):
        values = latency.by_scenario(queries)
        specs["histogram"] = latency.histogram(values, bench.meta["scenarios"])
        specs["ecdf"] = latency.ecdf(values)
        specs["over-time"] = latency.over_time(queries, bench)
        specs["telemetry"] = telemetry.chart(bench)
    if bench.meta["batches"]:
        specs["throughput"] = latency.throughput(bench.meta["batches"])
    if staircase:
        specs["staircase"] = networks.staircase(staircase["layers"])
    if attribution:
        specs["confusion"] = networks.confusion(attribution["classes"], attribution["confusion"])
    return {name: spec for name, spec in specs.items() if spec}


def _read(bench: Artifact, name: str) -> dict[str, Any] | None:
    if name not in bench.files:
        return None
    found: dict[str, Any] = json.loads(bench.file(name).read_text(encoding="utf-8"))
    return found


def _gallery(data: Artifact, attribution: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the images that device and host, or device and label, disagree on, as PNG in data URIs."""
    images = np.load(data.file("test.images.npy"), mmap_mode="r")
    classes = attribution["classes"]

    def name(index: int | None) -> str | None:
        return None if index is None else str(classes[index]) if classes else f"class {index}"

    return [
        {
            "image": found["image"],
            "uri": _uri(images[found["image"]]),
            "label": name(found["label"]),
            "expected": name(found["expected"]),
            "device": name(found["device"]),
            "cause": found["cause"],
        }
        for found in attribution["disagreements"][:_IMAGES]
    ]


def _uri(image: Any) -> str:
    """Return a PNG of an image, uint8 ``(3, S, S)``."""
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    picture.thumbnail((_PIXELS, _PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
