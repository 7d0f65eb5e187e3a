"""Runs as they were recorded: found by name, with the artifacts that their pages are made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit import stages, units
from toolkit.errors import StageError, UsageError
from toolkit.report import comparison, figures, page, vega
from toolkit.report.comparison import Entry
from toolkit.report.document import FORMAT
from toolkit.store import Artifact, DamagedError, Store


def find(build: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the documents of runs, of the newest one when none is named.

    Raises:
        UsageError: There is no such run, or another version of the toolkit recorded it.
    """
    known = sorted(path.parent.name for path in (build / "runs").glob("*/run.json"))
    if not known:
        raise UsageError(f"no run is recorded below {build / 'runs'}", "make one: toolkit run TARGET")
    documents = []
    for name in names or known[-1:]:
        if name not in known:
            raise UsageError(f"no run is called '{name}' in {build / 'runs'}", units.nearest(name, known))
        document = json.loads((build / "runs" / name / "run.json").read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise UsageError(
                f"run {name} was recorded by another version: format {document['format']} instead of {FORMAT}",
                f"run it again: toolkit run {document['target']}",
            )
        documents.append(document)
    return documents


def nearest(build: Path, document: Mapping[str, Any]) -> str | None:
    """Return a sentence on the smallest network recorded that is as accurate as a run's contract asks for.

    Args:
        build: Folder of runs and artifacts.
        document: Of the run.

    Returns:
        None where that run lost no more accuracy than it may, or was not pruned to a budget.
    """
    if document["budget"] is None or "failed" not in _accuracy(document):
        return None
    alike = ("format", "target", "profile", "workload", "fast")
    others = (json.loads(path.read_text(encoding="utf-8")) for path in (build / "runs").glob("*/run.json"))
    keeping = [
        other
        for other in others
        if all(other.get(key) == document[key] for key in alike)
        and other["verdict"]
        and other["engine"]["precision"] == document["engine"]["precision"]
        and _accuracy(other) == {"passed"}
    ]
    if not keeping:
        return (
            f"no budget that was measured here keeps enough of it; toolkit sweep {document['target']} "
            "--flops 90%,80%,70% measures several"
        )
    best = min(keeping, key=lambda other: other["model"]["final"]["flops"])
    return f"the nearest budget here that kept enough of it is {best['budget']} (run {best['run']})"


def _accuracy(document: Mapping[str, Any]) -> set[str]:
    """Return what became of the clauses on accuracy; nothing of a probe, which is judged without them."""
    lines = document["verdict"]["lines"] if document["verdict"] else []
    return {line["status"] for line in lines if line["what"] in ("accuracy", "accuracy drop")}


def write(build: Path, documents: Sequence[Mapping[str, Any]], out: Path | None) -> Path:
    """Write the page of a run again, or a page that compares several, or the devices of a fleet's run.

    Args:
        build: Folder of runs and artifacts.
        documents: From :func:`find`.
        out: The file; ``None`` for ``report.html`` in the run's folder, or ``comparison.html`` in ``build``.

    Returns:
        The file.

    Raises:
        StageError: A run was never measured, or its artifacts are not in the store any more.
    """
    store = Store(build / "store")
    with store.in_use():
        if len(documents) == 1 and "hosts" not in documents[0]:
            out = out or build / "runs" / documents[0]["run"] / "report.html"
            text = page.html(documents[0], drawn(store, documents[0]))
        else:
            entries, left_out = _entries(store, documents)
            names = ", ".join(document["run"] for document in documents)
            title = names if len(documents) == 1 else f"{len(entries)} measurements side by side"
            out = out or build / ("comparison.html" if len(documents) > 1 else f"runs/{names}/report.html")
            text = comparison.html(title, entries, left_out, vega.library(store.root / ".vega"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return out


def markdown(document: Mapping[str, Any]) -> str:
    """Return the Markdown of a run, of a fleet's that of every device that was measured."""
    hosts = [{**document, **host, "target": host["host"]} for host in document.get("hosts", ())]
    measured = [page.markdown(part) for part in hosts or [dict(document)] if part["bench"]]
    if not measured:
        raise _unmeasured(document)
    return "\n".join(measured)


def drawn(store: Store, document: Mapping[str, Any]) -> Artifact:
    """Return the ``report`` artifact of a run, drawn anew where it is not there."""
    made = {name: artifact(store, document, name) for name in figures.INPUTS if name in document["artifacts"]}
    if "bench" not in made:
        raise _unmeasured(document)
    return store.produce(
        "report",
        Store.key("report", stages.VERSIONS["report"], {}, made),
        lambda work: figures.draw(work.out, made, store.root / ".vega"),
        config={},
        inputs=made,
        fast=document["fast"],
    )


def artifact(store: Store, document: Mapping[str, Any], stage: str) -> Artifact:
    """Return an artifact of a recorded run; raises StageError when it is not there any more."""
    key = document["artifacts"][stage]
    again = f"make it again: toolkit bench {document['target']}, with the options of that run"
    try:
        found = store.lookup(stage, key)
    except DamagedError as damage:
        raise StageError(f"an artifact of run {document['run']} is damaged: {damage}", again) from damage
    if found is None:
        raise StageError(
            f"run {document['run']} has lost its artifact {stage}/{key}: gc removes what no recent run needs",
            again,
        )
    return found


def _entries(store: Store, documents: Sequence[Mapping[str, Any]]) -> tuple[list[Entry], list[str]]:
    """Return what was measured, and of a fleet's hosts those that were not, with the reason."""
    entries, left_out = [], []
    for document in documents:
        if "hosts" not in document:
            if document["bench"] is None:
                raise _unmeasured(document)
            label = document["run"].partition("-")[2]
            entries.append(Entry(label, document, artifact(store, document, "bench")))
        for host in document.get("hosts", ()):
            whole = {**document, **host}
            if host["bench"] is None:
                left_out.append(f"{host['host']} was not measured: {host['reason']}")
            else:
                label = (
                    host["host"] if len(documents) == 1 else f"{host['host']} {document['run'].rpartition('-')[2]}"
                )
                entries.append(Entry(label, whole, artifact(store, whole, "bench")))
    if not entries:
        raise _unmeasured(documents[0])
    return entries, left_out


def _unmeasured(document: Mapping[str, Any]) -> StageError:
    why = f": {document['error']['message']}" if document["error"] else ""
    return StageError(
        f"run {document['run']} ended before anything was measured{why}",
        f"measure: toolkit bench {document['target']}",
    )
