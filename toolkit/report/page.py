"""The page and the Markdown of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from toolkit import units
from toolkit.bench.contract import show
from toolkit.stages import Done
from toolkit.store import Artifact

_WORDS = {"passed": "kept", "failed": "broken", "undecided": "undecided"}
_CAPTIONS = {
    "before-after.svg": "The network before and after pruning and fine-tuning",
    "latency.svg": "Latency of single queries (SingleStream): histogram, and share of queries at most so slow",
    "latency-over-time.svg": "Latency while it was measured",
    "widths.svg": "Channels of the layers that were pruned",
    "training.svg": "Validation accuracy, epoch by epoch",
}


def write(folder: Path, document: dict[str, Any], stages: list[Done], pictures: Artifact) -> None:
    """Write ``report.html`` (self-contained) and ``report.md`` into a run's folder.

    Args:
        folder: The run's folder.
        document: The run's document.
        stages: What became of each stage.
        pictures: The ``report`` artifact.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.startswith("page.html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"show": show, "count": units.count, "size": units.size, "duration": units.duration}
    figures = [
        {"caption": _CAPTIONS[name], "svg": pictures.file(name).read_text(encoding="utf-8")}
        for name in pictures.meta["figures"]
    ]
    values = {"run": document, "figures": figures, "stages": stages, "words": _WORDS}
    for template, name in (("page.html.j2", "report.html"), ("page.md.j2", "report.md")):
        text = environment.get_template(template).render(values)
        (folder / name).write_text(text, encoding="utf-8")
