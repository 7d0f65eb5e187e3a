"""The page's pictures, as SVG that follows the page's colours and needs no script."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from toolkit.bench import statistics
from toolkit.store import Artifact

_INK = "#010203"  # stands for the page's text colour; replaced by currentColor
_BEFORE, _AFTER, _LINE = "#8a94a6", "#76b900", "#3b82f6"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "toolkit",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


def draw(
    out: Path, baseline: Artifact | None, pruned: Artifact | None, tuned: Artifact | None, bench: Artifact
) -> dict[str, Any]:
    """Write one SVG a picture; a user's ONNX file has none of networks and training.

    Returns:
        ``figures``: file names, in the order of the page.
    """
    latencies = statistics.load(bench.file("latencies.npy")) / 1e6
    with mpl.rc_context(_STYLE):
        pictures = {
            "before-after.svg": _before_after(baseline.meta, tuned.meta) if baseline and tuned else "",
            "latency.svg": _latency(latencies, bench.meta["latency_ms"]),
            "latency-over-time.svg": _over_time(latencies),
            "widths.svg": _widths(pruned.meta["widths"]) if pruned else "",
            "training.svg": _training(baseline.meta["history"], tuned.meta["history"])
            if baseline and tuned
            else "",
        }
    kept = {name: svg for name, svg in pictures.items() if svg}
    for name, svg in kept.items():
        (out / name).write_text(svg, encoding="utf-8")
    return {"figures": list(kept)}


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def _before_after(before: dict[str, Any], after: dict[str, Any]) -> str:
    figure, axes = plt.subplots(1, 3, figsize=(8, 2.4), layout="constrained")
    quantities = (
        ("test accuracy (%)", "accuracy", 100, "{:.2f}"),
        ("MFLOPs", "flops", 1e-6, "{:.1f}"),
        ("parameters (k)", "params", 1e-3, "{:.0f}"),
    )
    for axis, (title, key, factor, form) in zip(axes, quantities, strict=True):
        values = [before[key] * factor, after[key] * factor]
        bars = axis.barh(["before", "after"], values, color=[_BEFORE, _AFTER], height=0.6)
        axis.bar_label(bars, [form.format(value) for value in values], padding=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, max(values) * 1.3)
        axis.invert_yaxis()
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
    return _svg(figure)


def _latency(values: Any, summary: dict[str, float | None]) -> str:
    figure, (histogram, ecdf) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    top = float(np.percentile(values, 99.5))
    shown = values[values <= top]
    histogram.hist(shown, bins=60, color=_AFTER)
    histogram.set_xlabel(f"ms ({len(values) - len(shown)} of {len(values):,} lie beyond)")
    histogram.set_ylabel("queries")
    ordered = np.sort(values)
    some = np.unique(np.linspace(0, len(ordered) - 1, 1000).astype(int))
    ecdf.plot(ordered[some], (some + 1) / len(ordered) * 100, color=_LINE)
    ecdf.set_xlim(ordered[0], max(top, ordered[0] * 1.01))
    ecdf.set_xlabel("ms")
    ecdf.set_ylabel("queries at most so slow (%)")
    for axis in (histogram, ecdf):
        _mark(axis, summary)
    return _svg(figure)


def _mark(axis: Axes, summary: dict[str, float | None]) -> None:
    for height, name in ((0.98, "p50"), (0.86, "p90"), (0.74, "p99")):
        value = summary[name]
        if value is not None:
            axis.axvline(value, color=_INK, linewidth=0.8, linestyle=":")
            axis.text(value, height, f" {name}", transform=axis.get_xaxis_transform(), va="top", fontsize=8)


def _over_time(values: Any) -> str:
    """Median and spread of consecutive groups of queries, against time."""
    figure, axis = plt.subplots(figsize=(8, 2.2), layout="constrained")
    groups = np.array_split(values, min(200, len(values)))
    seconds = np.cumsum([group.sum() for group in groups]) / 1e3
    low, middle, high = (np.array([np.percentile(g, q) for g in groups]) for q in (5, 50, 95))
    axis.fill_between(seconds, low, high, color=_LINE, alpha=0.25, linewidth=0, label="5 to 95 %")
    axis.plot(seconds, middle, color=_LINE, linewidth=1, label="median")
    axis.set_xlabel("seconds of measuring")
    axis.set_ylabel("ms")
    axis.set_ylim(0, float(np.percentile(high, 98)) * 1.3)
    axis.legend(loc="lower right", ncols=2, fontsize=8)
    return _svg(figure)


def _widths(widths: dict[str, list[int]]) -> str:
    changed = {name: pair for name, pair in widths.items() if pair[0] != pair[1]}
    if not changed:
        return ""
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.24 * len(changed)), layout="constrained")
    names = list(changed)
    axis.barh(names, [changed[name][0] for name in names], color=_BEFORE, height=0.7, label="before")
    axis.barh(names, [changed[name][1] for name in names], color=_AFTER, height=0.4, label="after")
    for row, (before, after) in enumerate(changed.values()):
        axis.text(before, row, f" {before} → {after}", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(before for before, _ in changed.values()))
    axis.set_xlabel("channels")
    figure.legend(loc="outside upper right", ncols=2, fontsize=8)
    return _svg(figure)


def _training(train: list[dict[str, float]], tune: list[dict[str, float]]) -> str:
    if not train and not tune:
        return ""
    figure, axis = plt.subplots(figsize=(8, 2.4), layout="constrained")
    axis.plot(range(1, len(train) + 1), [100 * e["val"] for e in train], color=_BEFORE, label="training")
    after = range(len(train) + 1, len(train) + len(tune) + 1)
    axis.plot(after, [100 * e["val"] for e in tune], color=_AFTER, label="fine-tuning of the pruned network")
    axis.set_xlabel("epoch")
    axis.set_ylabel("validation accuracy (%)")
    axis.legend(loc="lower right", fontsize=8)
    return _svg(figure)
