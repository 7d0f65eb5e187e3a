"""One line a stage, and a few lines at the end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from toolkit import units
from toolkit.bench.contract import interval, show
from toolkit.engines import places


def describe(stage: str, meta: Mapping[str, Any]) -> str:
    """Return what is worth knowing of a stage's result, in one line."""
    return _DESCRIBE[stage](meta) if meta and stage in _DESCRIBE else ""


def _data(meta: Mapping[str, Any]) -> str:
    if not meta["classes"]:
        calibrate, test = meta["counts"]["train"], meta["counts"]["test"]
        what = f"{calibrate:,} + {test:,} images (calibration + test)" if calibrate else f"{test:,} random images"
        return f"{what}, without labels"
    counts = " + ".join(f"{meta['counts'][split]:,}" for split in ("train", "val", "test"))
    left_out = f", {len(meta['skipped'])} bad files left out" if meta["skipped"] else ""
    return f"{counts} images (train + val + test), {len(meta['classes'])} classes{left_out}"


def _check(meta: Mapping[str, Any]) -> str:
    size = f"{units.flops(meta['flops'])}, {units.count(meta['params'])} parameters"
    if meta["smallest"] is None:
        return f"{size}, cannot be pruned by {meta['pruner']}"
    text = f"{size}, can be pruned to {meta['smallest'] / meta['flops']:.1%} by {meta['pruner']}"
    if not meta["skipped"]:
        return text
    names = list(meta["skipped"])
    more = f" and {len(names) - 3} more layers" if len(names) > 3 else ""
    return f"{text}, which skips {', '.join(names[:3])}{more} ({meta['unprunable']:.1%} of the FLOPs)"


def _network(meta: Mapping[str, Any]) -> str:
    ended = f"; ended after epoch {len(meta['history'])}: {meta['stopped']}" if meta.get("stopped") else ""
    return f"test accuracy {meta['accuracy']:.2%}, {units.flops(meta['flops'])}{ended}"


def _prune(meta: Mapping[str, Any]) -> str:
    if not meta["pruned"]:
        return "nothing is pruned: the budget is not below the baseline"
    return f"{_network(meta)} before fine-tuning, by {meta['pruner']}"


def _export(meta: Mapping[str, Any]) -> str:
    compared = meta["comparison"]
    parts = [
        f"opset {meta['opset']}",
        units.size(meta["bytes"]),
        f"differs from {compared['with']} by at most {compared['max_absolute']:.1g}",
    ]
    if compared["top1_agreement"] is not None:
        parts.append(f"same top-1 on {compared['top1_agreement']:.1%}")
    if meta["batch"] != "dynamic":
        parts.append("batch 1 only (it is fixed inside the graph)")
    return ", ".join(parts)


def _quantize(meta: Mapping[str, Any]) -> str:
    parts = [f"{meta['precision']} for {meta['spelling']}", units.size(meta["bytes"])]
    if meta["calibration_images"]:
        parts.append(f"calibrated on {meta['calibration_images']} images ({meta['calibration']})")
    if meta["drop"] is not None:
        parts.append(f"{_lost(meta['drop'])} on validation images")
    if meta["qat"]:
        count = meta["qat"]["epochs"]
        epochs = f"{count} epoch{'s' if count > 1 else ''} of quantisation-aware training"
        better = f"after {epochs} (before: {_lost(meta['qat']['before'])})"
        parts.append(better if meta["qat"]["taken"] else f"no better after {epochs}, which is left out")
    if meta["kept"]:
        nodes = ", ".join(entry["node"] for entry in meta["kept"][:3])
        more = f" and {len(meta['kept']) - 3} more" if len(meta["kept"]) > 3 else ""
        parts.append(f"kept in fp32: {nodes}{more}")
    return ", ".join(parts)


def _lost(drop: float) -> str:
    if not drop:
        return "as accurate"
    return f"{'loses' if drop > 0 else 'gains'} {abs(drop):.2%}"


def _reference(meta: Mapping[str, Any]) -> str:
    images = f"ONNX Runtime on the host, {meta['images']:,} images"
    if meta["accuracy"]["exported"] is None:
        return images
    accuracy = f"{images}: accuracy {meta['accuracy']['exported']:.2%}"
    if meta["precision"] == "fp32":
        return accuracy
    return f"{accuracy}, {meta['accuracy']['graph']:.2%} in {meta['precision']}"


def _build(meta: Mapping[str, Any]) -> str:
    capabilities = meta["fingerprint"].get("compute_capability")
    whom = f" for {', '.join(capabilities)}" if capabilities else ""
    version = meta["fingerprint"]["version"]
    return f"{meta['runtime']} {version}, {meta['precision']}{whom}, {units.size(meta['bytes'])}"


def _push(meta: Mapping[str, Any]) -> str:
    return f"release {meta['release']}" + (f", {units.size(meta['sent'])} sent" if meta["sent"] else "")


def _bench(meta: Mapping[str, Any]) -> str:
    values = [meta["latency_ms"][p]["value"] for p in ("p50", "p90", "p99")]
    shown = " / ".join("–" if value is None else f"{value:.3f}" for value in values)
    rate = meta["throughput"]
    return (
        f"p50 / p90 / p99 {shown} ms, {rate['samples_per_s']['value']:,.0f} samples/s at batch {rate['batch']}, "
        f"{_quality(meta)}" + "".join(f", {what} {state}" for what, state in meta["tuning"]["set"].items())
    )


def _quality(meta: Mapping[str, Any]) -> str:
    """Return the accuracy, or what stands in its place."""
    if meta["accuracy"] is not None:
        return f"accuracy {meta['accuracy']:.2%}"
    agreement = meta["agreement"]
    if agreement is None:
        return "accuracy not measured"
    if agreement["top1"] is not None:
        return f"same top-1 as ONNX Runtime fp32 on {agreement['top1']:.1%}"
    return f"differs from ONNX Runtime fp32 by at most {agreement['max_absolute']:.1g}"


def _compare(meta: Mapping[str, Any]) -> str:
    return f"beside {meta['against']}: {meta['sentence']}"


_DESCRIBE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "data": _data,
    "check": _check,
    "teacher": _network,
    "train": _network,
    "prune": _prune,
    "finetune": _network,
    "export": _export,
    "quantize": _quantize,
    "reference": _reference,
    "build": _build,
    "push": _push,
    "bench": _bench,
    "compare": _compare,
    "report": lambda meta: f"{len(meta['charts'])} charts",
}


def summary(document: Mapping[str, Any], picture: str = "") -> str:
    """Return the end of a run for a terminal: latencies, the verdict with its lines, the commitment, the page.

    Args:
        document: Of the run.
        picture: Two lines from :func:`toolkit.report.sparkline.picture`; empty where nothing was measured.
    """
    lines = [f"latency   {picture.replace(chr(10), chr(10) + 10 * ' ')}"] if picture else []
    if text := runtimes(document):
        lines.append(f"runtime   {text}")
    if document.get("hosts"):
        lines += _fleet(document["hosts"])
    if document["fast"]:
        lines.append("FAST RUN: a short recipe on part of the data; its accuracy is not the model's best")
    verdict = document["verdict"]
    if verdict:
        lines.append(f"contract  {'passed' if verdict['passed'] else verdict['status'].upper()}")
        for line in verdict["lines"]:
            mark = "ok" if line["passed"] else line["status"].upper()
            measured, within = show(line["measured"], line["unit"]), interval(line, line["unit"])
            lines.append(f"  {mark:<9}  {line['what']:<13} {measured:>15}  {within:>23}   {line['reason']}")
    if document["bench"]:
        for finding in document["bench"]["stability"]["findings"]:
            hint = f"; {finding['hint']}" if finding["hint"] else ""
            lines.append(f"unsteady  {finding['text']}{hint}")
    if document["commit"]:
        commit = document["commit"]
        state = "committed" if commit["committed"] else "not committed"
        lines.append(f"release   {state}: {commit['reason']}")
    if document["report"]:
        lines.append(f"report    {document['report']}")
    return "\n".join(lines)


def runtimes(document: Mapping[str, Any]) -> str:
    """Return which runtimes were measured for a run's engine, its own first; empty where that is the only one."""
    engine = document["engine"]
    found = engine.get("runtimes", {}) if engine else {}  # documents from before have none
    if len(found) < 2:
        return ""
    own = engine["runtime"]
    medians = {name: p50["value"] or math.inf for name, p50 in found.items()}
    told = {
        name: f"{places.NAMES[name]} (p50 {'not measured' if median == math.inf else show(median, 'ms')})"
        for name, median in medians.items()
    }
    why = "faster here than" if medians[own] == min(medians.values()) else "since the contract is broken by"
    return f"{told.pop(own)}, {why} {' and '.join(told.values())}"


def _fleet(hosts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of a fleet: a row a host, and how many came through."""
    rows = [("host", "current", "p99", "result")]
    for host in hosts:
        p99 = host["bench"]["latency_ms"]["p99"]["value"] if host["bench"] else None
        latency = "–" if p99 is None else f"{p99:.3f} ms"
        rows.append((host["host"], host["current"] or "–", latency, f"{host['status']}: {host['reason']}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows]
    counts = Counter(host["status"] for host in hosts)
    return [*table, f"{len(hosts)} hosts: {', '.join(f'{count} {status}' for status, count in counts.items())}"]


def sweep(document: Mapping[str, Any]) -> str:
    """Return the end of a sweep for a terminal: a row a candidate, the fastest first, and the one to ship."""
    rows = [("", "candidate", "p50", "accuracy", "FLOPs", "contract")]
    measured = sorted(document["candidates"], key=lambda one: (one["p50"] or {}).get("value") or float("inf"))
    for one in measured:
        p50 = one["p50"]
        rows.append((
            "→" if one["label"] == document["recommended"] else "◆" if one["front"] else "",
            one["label"],
            "–" if not p50 or p50["value"] is None else f"{p50['value']:.3f} ms  {interval(p50, 'ms'):>18}",
            show(one["accuracy"], "") if one["accuracy"] is not None else "–",
            "–" if one["flops"] is None else units.count(one["flops"]),
            one["error"]["message"] if one["error"] else one["verdict"] or "not judged",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        f"{a:<{widths[0]}} {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e:>{widths[4]}}  {f}"
        for a, b, c, d, e, f in rows
    ]
    if document["fast"]:
        lines.append("FAST RUNS: a short recipe on part of the data; their accuracy is not the models' best")
    chosen = document["recommended"]
    lines.append(f"ship      {chosen}: {document['why']}" if chosen else f"ship      none: {document['why']}")
    if commit := document["commit"]:
        lines.append(f"release   {'committed' if commit['committed'] else 'not committed'}: {commit['reason']}")
    if document["report"]:
        lines.append(f"report    {document['report']}")
    return "\n".join(lines)
