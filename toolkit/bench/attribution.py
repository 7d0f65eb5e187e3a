"""Where accuracy was lost: the same test images followed from the unpruned network to the device."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.bench.agreement import agreement
from toolkit.bench.reference import load
from toolkit.compression import data as datasets
from toolkit.store import Artifact

_LISTED = 200  # disagreements that are kept: as many as anybody looks at
_TOP5_CLASSES = 20  # with fewer, five guesses are no feat
_CAUSES = {"final": "pruning", "exported": "export", "graph": "quantization", "device": "device"}

Logits = NDArray[np.float32]
Classes = NDArray[np.int64]


@dataclass(frozen=True)
class Link:
    """One place in the chain.

    Attributes:
        name: ``baseline``, ``final``, ``exported``, ``graph`` or ``device``.
        where: What computed there, for people.
        logits: Float32 ``(N, classes)`` of all test images, in order.
        classes: The largest of each image's, ``(N,)``.
    """

    name: str
    where: str
    logits: Logits
    classes: Classes


def attribute(
    out: Path,
    data: Artifact,
    baseline: Artifact | None,
    tuned: Artifact | None,
    reference: Artifact,
    logits: Path,
) -> dict[str, Any]:
    """Follow every test image from the unpruned network to the device; writes ``attribution.json``.

    The steps and their causes: to the fine-tuned network (``pruning``), to the exported fp32 graph in ONNX Runtime
    on the host (``export``), to the graph in the engine's precision there (``quantization``; left out where that
    is the same graph), to the engine on the device (``device``).

    Args:
        out: Folder for ``attribution.json``; none is written where the output is not ``(N, classes)``.
        data: Its test images were computed everywhere.
        baseline: The unpruned network, with its ``test.logits.npy``; None for a user's ONNX file.
        tuned: The pruned and fine-tuned one, likewise.
        reference: What the host's ONNX Runtime said.
        logits: What the device said, float32 ``(N, ...)``.

    Returns:
        ``accuracy`` and ``top5`` of the device (0 to 1; None without labels, ``top5`` also with fewer than 20
        classes), ``agreement`` (see :mod:`toolkit.bench.agreement`) and ``attribution``: ``chain``, ``steps`` and
        ``sentence``, or None where the output is not ``(N, classes)``.
    """
    found: dict[str, Any] = {"accuracy": None, "top5": None, "agreement": agreement(reference, logits)}
    if load(reference, "exported").ndim != 2:
        return found | {"attribution": None}
    names = data.meta["classes"]
    labels: Classes | None = np.asarray(datasets.load(data, "test").labels) if names else None
    links = list(_chain(baseline, tuned, reference, logits))
    chain = [_rates(link, labels) for link in links]
    steps = [_step(before, after, labels) for before, after in itertools.pairwise(links)]
    images = len(links[-1].classes)
    whole = {
        "classes": names,
        "images": images,
        "chain": chain,
        "steps": steps,
        "per_class": [] if labels is None else _per_class(names, labels, links),
        "confusion": [] if labels is None else _confusion(len(names), labels, links[-1].classes),
        "disagreements": _disagreements(links, labels),
    }
    (out / "attribution.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    return found | {
        "accuracy": chain[-1]["top1"],
        "top5": chain[-1]["top5"],
        "attribution": {"chain": chain, "steps": steps, "sentence": _sentence(steps, images)},
    }


def _chain(baseline: Artifact | None, tuned: Artifact | None, reference: Artifact, device: Path) -> Iterator[Link]:
    precision = reference.meta["precision"]
    if baseline and tuned:
        yield _link("baseline", "PyTorch, unpruned", baseline.file("test.logits.npy"))
        yield _link("final", "PyTorch, pruned and fine-tuned", tuned.file("test.logits.npy"))
    yield _link("exported", "ONNX Runtime fp32 on the host", load(reference, "exported"))
    if precision != "fp32":
        yield _link("graph", f"ONNX Runtime {precision} on the host", load(reference, "graph"))
    yield _link("device", f"the {precision} engine on the device", device)


def _link(name: str, where: str, logits: Path | Logits) -> Link:
    opened: Logits = np.load(logits, mmap_mode="r") if isinstance(logits, Path) else logits
    return Link(name, where, opened, opened.argmax(1))


def _rates(link: Link, labels: Classes | None) -> dict[str, Any]:
    top1 = None if labels is None else float((link.classes == labels).mean())
    top5 = None if labels is None or link.logits.shape[1] < _TOP5_CLASSES else _top5(link.logits, labels)
    return {"name": link.name, "where": link.where, "top1": top1, "top5": top5}


def _top5(logits: Logits, labels: Classes) -> float:
    """Return the share of images whose label is among the five largest logits; what is no number counts against."""
    own = np.take_along_axis(logits, labels[:, None], 1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]  # of equals the first is the larger, as argmax has it
    ahead = ~(logits <= own) | ((logits == own) & earlier)
    return float((ahead.sum(1) < 5).mean())


def _step(before: Link, after: Link, labels: Classes | None) -> dict[str, Any]:
    changed = before.classes != after.classes
    lost = gained = None
    if labels is not None:
        lost = int(((before.classes == labels) & changed).sum())
        gained = int(((after.classes == labels) & changed).sum())
    return {
        "from": before.name,
        "to": after.name,
        "cause": _CAUSES[after.name],
        "agree": float(1 - changed.mean()),
        "lost": lost,
        "gained": gained,
        "changed": int(changed.sum()),
    }


def _per_class(names: list[str], labels: Classes, links: list[Link]) -> list[dict[str, Any]]:
    images = np.bincount(labels, minlength=len(names))
    right = {link.name: np.bincount(labels[link.classes == labels], minlength=len(names)) for link in links}

    def accuracy(link: str, index: int) -> float | None:
        return float(right[link][index] / images[index]) if link in right and images[index] else None

    return [
        {
            "class": name,
            "images": int(images[index]),
            "baseline": accuracy("baseline", index),
            "device": accuracy("device", index),
        }
        for index, name in enumerate(names)
    ]


def _confusion(classes: int, labels: Classes, found: Classes) -> list[list[int]]:
    counts = np.bincount(labels * classes + found, minlength=classes * classes)
    rows: list[list[int]] = counts.reshape(classes, classes).tolist()
    return rows


def _disagreements(links: list[Link], labels: Classes | None) -> list[dict[str, Any]]:
    """List images that the device sees otherwise than its graph, then those that an earlier step has lost.

    Lost is what the device gets wrong and an earlier link got right; the last step that turned it is the cause.
    Without labels the first link stands for what is right.
    """
    right = links[0].classes if labels is None else labels
    device = links[-1].classes
    cause = np.full(len(device), -1)
    for step, (before, after) in enumerate(itertools.pairwise(links)):
        cause[(before.classes == right) & (after.classes != right) & (device != right)] = step
    last = len(links) - 2
    cause[links[-2].classes != device] = last
    own_first = np.concatenate([np.flatnonzero(cause == last), np.flatnonzero((cause >= 0) & (cause < last))])
    has_baseline = links[0].name == "baseline"
    return [
        {
            "image": int(image),
            "label": None if labels is None else int(labels[image]),
            "device": int(device[image]),
            "expected": int(links[cause[image]].classes[image]),
            "baseline": int(links[0].classes[image]) if has_baseline else None,
            "cause": _CAUSES[links[cause[image] + 1].name],
        }
        for image in own_first[:_LISTED]
    ]


def _sentence(steps: list[dict[str, Any]], images: int) -> str:
    if steps[0]["lost"] is None:
        told = ", ".join(f"{step['cause']} {step['changed']}" for step in steps)
        return f"images of {images:,} whose class changed: {told}"
    digits = max(2, len(str(images)) - 2)  # one image still shows

    def points(count: int) -> str:
        return f"{100 * count / images:+.{digits}f}".replace("-", "−") if count else "0"

    net = {step["cause"]: step["gained"] - step["lost"] for step in steps}
    told = ", ".join(f"{cause} {points(count)}" for cause, count in net.items())
    total = sum(net.values())
    much = points(total)[1:] if total else "no"
    return f"{much} points {'gained' if total > 0 else 'lost'}: {told}"
