"""The page and the Markdown of a run, put together from its document and its ``report`` artifact."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from toolkit import units
from toolkit.bench.contract import interval, show
from toolkit.report import terminal
from toolkit.store import Artifact

DETAILS, LIBRARY = "details.json", "vega.js"  # in the artifact, beside the charts
_HERE = Path(__file__).parent
_WORDS = {"passed": "kept", "failed": "broken", "undecided": "undecided"}


def write(folder: Path, document: Mapping[str, Any], report: Artifact) -> None:
    """Write ``report.html`` (self-contained) and ``report.md`` into a run's folder."""
    (folder / "report.html").write_text(html(document, report), encoding="utf-8")
    (folder / "report.md").write_text(markdown(document), encoding="utf-8")


def html(document: Mapping[str, Any], report: Artifact) -> str:
    """Return the page of a run: one file that needs nothing else, and no script to be read.

    Args:
        document: The run's document.
        report: What :func:`toolkit.report.figures.draw` has made.
    """
    charts = {name: chart(report, name, caption) for name, caption in report.meta["charts"].items()}
    details = json.loads(report.file(DETAILS).read_text(encoding="utf-8"))
    library = code_of(report.file(LIBRARY).read_text(encoding="utf-8"))
    judged = document["bench"]["scenario"]
    scenarios = sorted(document["bench"]["scenarios"].items(), key=lambda item: item[0] != judged)
    return render(
        "page.html.j2",
        run=document,
        charts=charts,
        library=library,
        scenarios=scenarios,
        runtimes=terminal.runtimes(document),
        **details,
    )


def markdown(document: Mapping[str, Any]) -> str:
    """Return the Markdown of a run, for a pull request."""
    return render("page.md.j2", run=document, runtimes=terminal.runtimes(document))


def chart(report: Artifact, name: str, caption: str) -> dict[str, Any]:
    """Return a chart as the templates take it: name, caption, SVG and specification."""
    svg, spec = (report.file(f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("svg", "json"))
    return {"name": name, "caption": caption, "svg": Markup(svg), "spec": data_of(spec)}


def code_of(library: str) -> Markup:
    """Return JavaScript as a ``script`` element may hold it."""
    return Markup(library.replace("</script", "<\\/script"))


def data_of(spec: str) -> Markup:
    """Return JSON as a ``script`` element may hold it."""
    return Markup(spec.replace("<", "\\u003c"))


def render(template: str, **values: Any) -> str:
    """Fill in a template of this folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=lambda name: name is not None and name.endswith("html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "show": show,
        "count": units.count,
        "size": units.size,
        "duration": units.duration,
        "value": value,
        "interval": interval,
        "cell": cell,
        "code": code,
    }
    return environment.get_template(template).render(words=_WORDS, clause_bar=clause_bar, **values)


def value(figure: Mapping[str, Any], unit: str) -> str:
    """Return a figure's value, or what it would take to know it."""
    if figure["value"] is None:
        return f"needs {figure['needs']:,} queries" if figure["needs"] else "not measured"
    return show(figure["value"], unit)


def code(text: str) -> Markup:
    """Return a sentence with what stands between backquotes as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def cell(text: object) -> str:
    """Return a text as a Markdown table takes it."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def clause_bar(line: Mapping[str, Any]) -> dict[str, float] | None:
    """Return where limit, measured value and interval stand in a clause's bar, in percent of its width."""
    if line["measured"] is None:
        return None
    low = line["measured"] if line["low"] is None else line["low"]
    high = line["measured"] if line["high"] is None else line["high"]
    start, end = min(0.0, low), 1.1 * max(line["limit"], high)
    if end <= start:
        return None
    places = {"limit": line["limit"], "measured": line["measured"], "low": low, "high": high}
    return {name: round(100 * (place - start) / (end - start), 2) for name, place in places.items()}
