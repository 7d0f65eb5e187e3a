"""Charts as Vega-Lite specifications: one look, an SVG that needs no script, and the library for the page."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Spec = dict[str, Any]

WIDTH, HALF = 760, 330  # pixels of a plot without its axes; the page replaces them by what there is room for
# the page's CSS says what these are, in light, in dark and in print
INK, SOFT, LINE, PAPER = "currentColor", "var(--soft)", "var(--line)", "var(--paper)"
BEFORE, AFTER, SECOND, BAD = "var(--before)", "var(--after)", "var(--second)", "var(--bad)"
SERIES = [AFTER, SECOND, "var(--third)", "var(--fourth)", "var(--fifth)", BEFORE]

_AXIS = {
    "labelColor": SOFT,
    "titleColor": SOFT,
    "gridColor": LINE,
    "domainColor": LINE,
    "tickColor": LINE,
    "labelFontSize": 11,
    "titleFontSize": 11,
    "titleFontWeight": "normal",
    "labelPadding": 4,
}
_CONFIG = {
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": _AXIS,
    "axisX": {"grid": False, "tickSize": 4, "tickCount": 7, "labelFlush": False, "labelOverlap": True},
    # the title stands over the axis, where it is read, and all plots begin at the same place
    "axisY": {
        "domain": False,
        "ticks": False,
        "titleAngle": 0,
        "titleAlign": "left",
        "titleAnchor": "end",
        "titleX": -44,
        "titleY": -12,
        "minExtent": 44,
        "maxExtent": 44,
        "tickCount": 4,
    },
    "legend": {
        "labelColor": INK,
        "labelFontSize": 11,
        "title": None,
        "orient": "top-right",
        "direction": "horizontal",
        "symbolOpacity": 1,
        "symbolStrokeWidth": 3,
        "offset": -22,
    },
    "text": {"color": INK, "fontSize": 11},
    "rule": {"color": INK},
}


def chart(description: str, body: Spec) -> Spec:
    """Return a whole specification.

    Args:
        description: What a screen reader says.
        body: The rest of it.
    """
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": description,
        "background": None,
        "padding": {"left": 2, "right": 12, "top": 4, "bottom": 2},
        "config": _CONFIG,
        **body,
    }


def layer(width: int, height: int, *layers: Spec, **more: Any) -> Spec:
    """Return marks on top of each other."""
    return {"width": width, "height": height, "layer": list(layers), **more}


def axis(field: str, title: str | None, kind: str = "quantitative", **more: Any) -> Spec:
    """Return the encoding of a field along an axis."""
    return {"field": field, "type": kind, "title": title, **more}


def series(field: str, names: Sequence[object], colors: list[str] | None = None, symbol: str = "stroke") -> Spec:
    """Return the encoding of a field by colour; a legend stands where there is more than one."""
    scale = {"domain": names, "range": (colors or SERIES)[: len(names)]}
    legend = {"symbolType": symbol} if len(names) > 1 else None
    return {"field": field, "type": "nominal", "scale": scale, "legend": legend}


def tooltip(*fields: tuple[str, str, str | None]) -> list[Spec]:
    """Return what is said at a mark: field, title, and number format or None for text."""
    return [
        {"field": field, "title": title, **({"format": form, "type": "quantitative"} if form else {})}
        for field, title, form in fields
    ]


def switches(names: list[str], field: str) -> Spec:
    """Return checkboxes that show and hide the series of a field; nothing where there is only one."""
    if len(names) < 2:
        return {}
    parameters = [
        {"name": f"show{number}", "value": True, "bind": {"input": "checkbox", "name": name}}
        for number, name in enumerate(names)
    ]
    shown = " || ".join(f"(datum.{field} === '{name}' && show{number})" for number, name in enumerate(names))
    return {"params": parameters, "transform": [{"filter": f"datum.{field} == null || {shown}"}]}


def zoom() -> list[Spec]:
    """Return a parameter that moves along x by dragging and zooms by Ctrl and the wheel."""
    return [
        {
            "name": "zoom",
            "bind": "scales",
            "select": {
                "type": "interval",
                "encodings": ["x"],
                # touch and the bare wheel go on scrolling the page
                "translate": "[mousedown, window:mouseup] > window:mousemove!",
                "zoom": "wheel![event.ctrlKey]",
                "clear": "dblclick",
            },
        }
    ]


def hover(name: str, mark: Spec, encoding: Spec, **more: Any) -> Spec:
    """Return a layer that only a pointer finds, by a name of its own in the chart; it is not in the SVG."""
    return {
        "name": f"hover {name}",
        "mark": {"filled": True, "clip": True, "aria": False, **mark},
        "encoding": encoding,
        **more,
    }


def short(value: Any) -> float:
    """Return a number with the six digits that a chart needs."""
    return float(f"{float(value):.6g}")


def svg(spec: Spec, name: str) -> str:
    """Draw a specification; ``name`` is its own in the page, where many drawings share one space of ids."""
    import vl_convert

    drawn = vl_convert.vegalite_to_svg(_still(spec), vl_version="6.4")
    return re.sub(r'(id="|url\(#)', rf"\g<1>{name}-", drawn)


def _still(part: Any) -> Any:
    """Return a specification without what only answers to a pointer."""
    if isinstance(part, dict):
        return {key: _still(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_still(value) for value in part if not _answers(value)]
    return part


def _answers(part: Any) -> bool:
    return isinstance(part, dict) and str(part.get("name", "")).startswith("hover ")


def library(cache: Path) -> str:
    """Return the JavaScript that draws specifications in a browser: Vega, Vega-Lite and Vega-Embed in one.

    Args:
        cache: Folder that keeps it, since bundling takes seconds.
    """
    kept = cache / f"vega-{metadata.version('vl-convert-python')}.js"
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    import vl_convert

    text: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # the stub forgets the default
    cache.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_name(f".{kept.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(kept)
    return text
