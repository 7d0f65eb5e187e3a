"""Charts of networks: before and after, widths, training, time against FLOPs, confusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.report import vega
from toolkit.report.vega import Spec, axis, layer, series, tooltip

_MANY_CLASSES = 40
_MANY_LAYERS = 40
_WIDTH = vega.WIDTH - 66  # the names of layers are longer than numbers
_NAMES = {"minExtent": 110, "maxExtent": 110, "labelLimit": 106, "domain": False}


def widths(found: Mapping[str, Sequence[int]]) -> Spec:
    """Return the channels of every layer before and after.

    Args:
        found: Layer → its width before and after; of many layers those that were pruned are shown.
    """
    if len(found) > _MANY_LAYERS:
        found = {name: pair for name, pair in found.items() if pair[0] != pair[1]}
    rows = [
        {"layer": name, "before": a, "after": b, "text": f"{a} → {b}" if a != b else f"{a}"}
        for name, (a, b) in found.items()
    ]
    y = axis(
        "layer",
        None,
        "nominal",
        sort=None,
        axis=_NAMES,
    )
    says = tooltip(("layer", "layer", None), ("before", "channels before", "d"), ("after", "channels after", "d"))

    def bar(field: str, color: str, band: float) -> Spec:
        return {
            "mark": {"type": "bar", "color": color, "height": {"band": band}},
            "encoding": {"x": axis(field, "channels"), "y": y, "tooltip": says},
        }

    text = {
        "mark": {"type": "text", "align": "left", "dx": 5, "color": vega.SOFT},
        "encoding": {"x": axis("before", "channels"), "y": y, "text": {"field": "text"}},
    }
    plot = layer(
        _WIDTH, 20 * len(rows), bar("before", vega.BEFORE, 0.72), bar("after", vega.AFTER, 0.36), text,
        data={"values": rows},
    )  # fmt: skip
    return vega.chart("Channels of each layer before and after pruning", plot)


def training(train: Sequence[Mapping[str, float]], tune: Sequence[Mapping[str, float]]) -> Spec:
    """Return validation accuracy, epoch by epoch."""
    names = ["training", "fine-tuning"]
    rows = [
        {"epoch": number, "phase": names[number > len(train)], "val": epoch["val"], "loss": epoch["loss"]}
        for number, epoch in enumerate([*train, *tune], 1)
    ]
    says = tooltip(
        ("phase", "phase", None),
        ("epoch", "epoch", "d"),
        ("val", "validation accuracy", ".2%"),
        ("loss", "loss", ".4f"),
    )
    line = {
        "mark": {"type": "line", "point": {"size": 28}, "strokeWidth": 1.5},
        "encoding": {
            "x": axis("epoch", "epoch", axis={"tickMinStep": 1, "format": "d"}, scale={"nice": False}),
            "y": axis("val", "validation accuracy", axis={"format": "~%"}),
            "color": series("phase", names, [vega.BEFORE, vega.AFTER]),
            "tooltip": says,
        },
    }
    return vega.chart("Validation accuracy by epoch", layer(vega.WIDTH, 160, line, data={"values": rows}))


def staircase(layers: Sequence[Mapping[str, Any]]) -> Spec:
    """Return each layer's share of time against its share of FLOPs; what misses the multiple is marked.

    Args:
        layers: Of ``staircase.json``; of many the slowest are shown.
    """
    names = ["share of FLOPs", "share of time"]
    slowest = sorted((row["us"] for row in layers), reverse=True)[:_MANY_LAYERS]
    shown = [row for row in layers if row["us"] >= slowest[-1]]
    labels = _short([row["name"] for row in shown])
    which = f", the {len(shown)} slowest of {len(layers)} layers" if len(shown) < len(layers) else ""
    rows = [
        {
            "layer": f"{label} ✱" if row["misses"] else label,
            "name": row["name"],
            "what": what,
            "share": row[key],
            "us": row["us"],
            "channels": f"{row['in_channels']} → {row['out_channels']}",
            "next": f"{row['next_width']} channels" if row["next_width"] else "–",
        }
        for label, row in zip(labels, shown, strict=True)
        for what, key in zip(names, ("flops_share", "time_share"), strict=True)
    ]
    says = tooltip(
        ("name", "layer", None), ("what", "what", None), ("share", "share", ".1%"), ("us", "µs a query", ",.1f"),
        ("channels", "channels", None), ("next", "next useful width", None),
    )  # fmt: skip
    bars = {
        "mark": {"type": "bar", "height": {"band": 0.8}},
        "encoding": {
            "y": axis(
                "layer",
                None,
                "nominal",
                sort=None,
                axis=_NAMES,
            ),
            "yOffset": {"field": "what", "sort": names},
            "x": axis("share", f"share of the whole{which}", axis={"format": "~%"}),
            "color": series("what", names, [vega.BEFORE, vega.AFTER], "square"),
            "tooltip": says,
        },
    }
    body = layer(_WIDTH, 26 * len(shown), bars, data={"values": rows})
    return vega.chart("Each layer's share of time against its share of FLOPs", body)


def _short(names: Sequence[str]) -> list[str]:
    """Return names of ONNX nodes without what all have and what is said twice: ``/layer1/layer1.0/conv1/Conv``."""
    paths = [name.strip("/").split("/") for name in names]
    paths = [path[:-1] if len(path) > 1 else path for path in paths]  # without the operator
    if len({path[0] for path in paths if len(path) > 1}) == 1 and all(len(path) > 1 for path in paths):
        paths = [path[1:] for path in paths]
    found = [
        ".".join(a for a, b in zip(path, [*path[1:], ""], strict=True) if not b.startswith(f"{a}."))
        for path in paths
    ]
    return found if len(set(found)) == len(names) else list(names)


def confusion(classes: Sequence[str], matrix: Sequence[Sequence[int]]) -> Spec | None:
    """Return what each class was taken for; None where there are too many classes for a picture."""
    if not matrix or len(classes) > _MANY_CLASSES:
        return None
    rows = []
    for true, line in enumerate(matrix):
        total = max(1, sum(line))
        rows += [
            {
                "label": classes[true],
                "device": classes[said],
                "images": count,
                "share": round(count / total, 4),
                "right": true == said,
            }
            for said, count in enumerate(line)
            if count
        ]
    few = len(classes) <= 12
    side = 300 if few else 460
    every = {"domain": list(classes)}
    x = axis(
        "device",
        "the device says",
        "nominal",
        scale=every,
        axis={"orient": "top", "labelAngle": 0 if few else -90, "domain": False, "ticks": False},
    )
    y = axis("label", "label", "nominal", scale=every, axis={"titleY": -26})
    says = tooltip(
        ("label", "label", None),
        ("device", "the device says", None),
        ("images", "images", ","),
        ("share", "of the label's", ".1%"),
    )
    squares = {
        "mark": {"type": "rect", "cornerRadius": 2},
        "encoding": {
            "x": x, "y": y, "tooltip": says,
            "color": series("right", [True, False], [vega.AFTER, vega.BAD]) | {"legend": None},
            "opacity": {
                "field": "share", "type": "quantitative", "legend": None,
                "scale": {"type": "pow", "exponent": 0.4, "domain": [0, 1], "range": [0.1, 1]},
            },
        },
    }  # fmt: skip
    layers: list[Spec] = [squares]
    if few:
        text = {
            "mark": {"type": "text", "fontSize": 10},
            "encoding": {"x": x, "y": y, "text": {"field": "images"}},
        }
        layers.append(text)
    return vega.chart(
        "Confusion matrix: labels against what the device says", layer(side, side, *layers, data={"values": rows})
    )
