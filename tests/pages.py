"""Runs that nobody measured: folders, artifacts and raw data as a real run leaves them, to try the page on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.report.document import FORMAT
from toolkit.store import Artifact, Store, Work, write_json

CLASSES = [str(digit) for digit in range(10)]
WIDTHS = {
    "conv1": [16, 16], "layer1.0.conv1": [16, 8], "layer1.0.conv2": [16, 16], "layer1.1.conv1": [16, 8],
    "layer1.1.conv2": [16, 16], "layer2.0.conv1": [32, 16], "layer2.0.conv2": [32, 32], "layer2.1.conv1": [32, 24],
    "layer2.1.conv2": [32, 32], "layer3.0.conv1": [64, 24], "layer3.0.conv2": [64, 64], "layer3.1.conv1": [64, 28],
    "layer3.1.conv2": [64, 64], "fc": [10, 10],
}  # fmt: skip
SECOND = 1_000_000_000


class Measured:
    """A store and runs below one folder."""

    def __init__(self, build: Path) -> None:
        self.build = build
        self.store = Store(build / "store")

    def run(
        self,
        name: str = "20261121T120000-host-cpu-0a1b",
        *,
        samples: int = 20_000,
        median_ms: float = 0.515,
        accuracy: float = 0.9861,
        labels: bool = True,
        classes: list[str] = CLASSES,
        networks: bool = True,
        telemetry: bool = True,
        duty: bool = True,
        fast: bool = False,
        status: str = "passed",
        until: str = "commit",
        target: str = "host-cpu",
    ) -> dict[str, Any]:
        """Lay one run with its artifacts and return its document.

        Args:
            labels: Whether the images have any; without them nothing says what is right.
            networks: Whether there were networks of ours; not for an ONNX file.
            until: Where the run broke off: ``train``, ``bench`` or ``commit``.
        """
        made = {"data": self._data(labels)}
        if networks:
            made |= self._networks(made["data"], fast)
        if until != "train":
            classes = classes if labels else []
            made["bench"] = self._bench(made, samples, median_ms, accuracy, classes, telemetry, duty, name)
        document = _document(name, target, made, fast, status, until)
        folder = self.build / "runs" / name
        folder.mkdir(parents=True)
        write_json(folder / "run.json", document)
        return document

    def fleet(self, name: str = "20261121T120500-shelf-5c6d") -> dict[str, Any]:
        """Lay a run on three devices, the last of which could not be reached."""
        parts = [
            self.run(f"{name}-{host}", median_ms=median, accuracy=accuracy, samples=4000, target="shelf")
            for host, median, accuracy in (("shelf-a", 0.52, 0.986), ("shelf-b", 0.71, 0.984))
        ]
        common = ("engine", "bench", "verdict", "commit", "stages", "artifacts", "error")
        hosts = [
            {"host": host, "wave": 1, "status": "committed", "reason": "it kept its contract", "current": "0" * 16}
            | {key: part[key] for key in common}
            for host, part in zip(("shelf-a", "shelf-b"), parts, strict=True)
        ]
        lost: dict[str, Any] = {"host": "shelf-c", "wave": 1, "status": "failed", "reason": "it does not answer"}
        lost |= {"current": None, "engine": None, "bench": None, "verdict": None, "commit": None, "stages": []}
        lost |= {"artifacts": {}, "error": {"message": "shelf-c does not answer", "hint": None}}
        nothing = {"engine": None, "bench": None, "verdict": None, "commit": None}
        document = parts[0] | nothing | {"run": name, "hosts": [*hosts, lost]}
        folder = self.build / "runs" / name
        folder.mkdir(parents=True)
        write_json(folder / "run.json", document)
        return document

    def _make(self, stage: str, inputs: dict[str, Artifact], config: dict[str, Any], make: Any) -> Artifact:
        key = Store.key(stage, 1, config, inputs)
        return self.store.produce(stage, key, make, config=config, inputs=inputs)

    def _data(self, labels: bool) -> Artifact:
        def make(work: Work) -> dict[str, Any]:
            random = np.random.default_rng(0)
            truth = np.arange(359) % 10
            images = random.integers(0, 70, (359, 3, 32, 32)).astype(np.uint8)
            for image, digit in zip(images, truth, strict=True):  # a digit is so many bars
                for bar in range(digit + 1):
                    image[:, 4:28, 1 + 3 * bar : 3 + 3 * bar] = 230
            np.save(work.out / "test.images.npy", images)
            if labels:
                np.save(work.out / "test.labels.npy", truth)
            counts = {"train": 1295, "val": 143, "test": 359}
            return {"classes": CLASSES if labels else [], "counts": counts, "skipped": [], "input_size": 32}

        return self._make("data", {}, {"labels": labels}, make)

    def _networks(self, data: Artifact, fast: bool) -> dict[str, Artifact]:
        def network(accuracy: float, flops: int, params: int) -> dict[str, Any]:
            return {"accuracy": accuracy, "flops": flops, "macs": flops // 2, "params": params}

        def history(epochs: int, last: float) -> list[dict[str, float]]:
            rise = 1 - np.exp(-np.arange(1, epochs + 1) / 3)
            return [{"loss": round(2.2 * (1 - r) + 0.01, 6), "val": round(float(last * r), 6)} for r in rise]

        before = network(0.9944, 81_102_208, 269_722) | {"history": history(16, 0.975)}
        pruned = network(0.6657, 43_943_296, 117_306) | {"widths": WIDTHS, "pruned": True}
        after = network(0.9916, 43_943_296, 117_306) | {"history": history(16, 0.972)}
        baseline = self._make("train", {"data": data}, {"fast": fast}, lambda work: before)
        cut = self._make("prune", {"baseline": baseline}, {"fast": fast}, lambda work: pruned)
        tuned = self._make("finetune", {"pruned": cut}, {"fast": fast}, lambda work: after)
        return {"train": baseline, "prune": cut, "finetune": tuned}

    def _bench(
        self,
        made: dict[str, Artifact],
        samples: int,
        median_ms: float,
        accuracy: float,
        classes: list[str],
        telemetry: bool,
        duty: bool,
        name: str,
    ) -> Artifact:
        config = {"samples": samples, "median": median_ms, "accuracy": accuracy, "duty": duty, "run": name}

        def make(work: Work) -> dict[str, Any]:
            rounds, single, slow = _rounds(work.out, samples, median_ms, telemetry, duty)
            staircase = _staircase("train" in made, median_ms)
            attribution = _attribution(classes, "train" in made, accuracy)
            write_json(work.out / "staircase.json", staircase)
            write_json(work.out / "attribution.json", attribution)
            return _meta(rounds, single, slow, bool(classes), accuracy, staircase, attribution, bool(telemetry))

        return self._make("bench", {"data": made["data"]}, config | {"telemetry": telemetry}, make)


def figure(value: float | None, spread: float = 0.01, needs: int | None = None) -> dict[str, Any]:
    """Return a figure with an interval of ``spread`` to either side."""
    if value is None:
        return {"value": None, "low": None, "high": None, "needs": needs}
    low, high = value * (1 - spread), value * (1 + spread)
    return {"value": round(value, 6), "low": round(low, 6), "high": round(high, 6), "needs": None}


def _latencies(count: int, median_ms: float, seed: int) -> NDArray[np.int64]:
    """A narrow mode with a heavy tail, a slow second mode, and neighbours: each value waits on the one before."""
    random = np.random.default_rng(seed)
    noise = random.normal(0, 1, count)
    for index in range(1, count):
        noise[index] += 0.4 * noise[index - 1]
    values = median_ms * np.exp(0.012 * noise)
    values += median_ms * 0.08 * (random.random(count) < 0.06)
    values += random.pareto(2.5, count) * median_ms * 0.004
    values[random.random(count) < 0.0004] *= 2.2
    return (values * 1e6).astype(np.int64)


def _rounds(
    out: Path, samples: int, median_ms: float, telemetry: bool, duty: bool
) -> tuple[list[dict[str, Any]], NDArray[np.int64], NDArray[np.int64]]:
    rounds, singles, slows = [], [], []
    clock = 5000 * SECOND
    for number in range(2):
        folder = out / f"round-{number}"
        folder.mkdir()
        scenarios = []

        def add(name: str, values: NDArray[np.int64], batch: int, took: int, extra: dict[str, Any]) -> None:
            nonlocal clock
            file = f"{name}-{batch}" if name == "Offline" else name
            np.save(folder / f"{file}.npy", values)  # noqa: B023
            entry = {"name": name, "batch": batch, "file": f"round-{number}/{file}.npy", "queries": len(values)}  # noqa: B023
            entry |= {"began_ns": clock, "ended_ns": clock + took, "cpu": _cpu()}
            scenarios.append(entry | extra)  # noqa: B023
            clock += took + SECOND // 4

        began = clock
        single = _latencies(samples // 2, median_ms, number)
        add("SingleStream", single, 1, int(single.sum() * 1.01), {})
        singles.append(single)
        for batch in (1, 8, 32):
            values = (_latencies(60, median_ms, 10 + batch) * batch * 0.93).astype(np.int64)
            add("Offline", values, batch, int(values.sum()), {})
        if duty:
            slow = _latencies(max(100, samples // 40), median_ms * 1.3, 50 + number)
            add("DutyCycle", slow, 1, len(slow) * 33_000_000, {"period_ms": 33, "late": 2})
            slows.append(slow)
        file = None
        if telemetry:
            file = f"round-{number}/telemetry.json"
            write_json(out / file, _telemetry(began, clock))
        rounds.append({"scenarios": scenarios, "telemetry": file})
        clock += 2 * SECOND
    return rounds, np.concatenate(singles), np.concatenate(slows) if slows else np.array([], np.int64)


def _cpu() -> dict[str, Any]:
    return {"involuntary_switches": 12, "major_faults": 0, "minor_faults": 41, "cpu_ms": 990.0}


def _telemetry(began: int, ended: int) -> dict[str, Any]:
    random = np.random.default_rng(3)
    times = np.arange(began, ended, 100_000_000)
    ramp = 1 - np.exp(-np.arange(len(times)) / 40)

    def channel(name: str, kind: str, unit: str, source: str, values: Any, digits: int = 1) -> dict[str, Any]:
        return {
            "name": name, "kind": kind, "unit": unit, "source": source,
            "values": [round(float(value), digits) for value in values],
        }  # fmt: skip

    noise = [random.normal(0, 1, len(times)) for _ in range(6)]
    temperature = channel("package", "temperature", "°C", "thermal_zone0", 48 + 17 * ramp + 0.3 * noise[0])
    temperature["values"][5] = None
    return {
        "interval_ms": 100,
        "times_ns": times.tolist(),
        "channels": [
            channel("cpu0 clock", "clock", "MHz", "cpufreq", 3400 - 180 * ramp + 6 * noise[1], 0),
            channel("cpu1 clock", "clock", "MHz", "cpufreq", 3380 - 160 * ramp + 6 * noise[2], 0),
            temperature,
            channel("package", "power", "W", "RAPL", 21 + 6 * ramp + 0.4 * noise[3]),
            channel("process", "memory", "MB", "/proc", 74 + 6 * ramp),
            channel("load", "load", "%", "/proc/stat", 52 + 2 * noise[4]),
            channel("steal", "steal", "%", "/proc/stat", np.abs(noise[5]) * 0.2, 2),
        ],
        "notes": ["fan: no device of this kind below /sys/class/hwmon"],
    }


def _staircase(networks: bool, median_ms: float) -> dict[str, Any]:
    random = np.random.default_rng(8)
    layers = []
    before = 3
    for name, (_, width) in WIDTHS.items():
        flops = before * width * 9 * 2 * (1024 if "layer3" not in name else 64)
        us = flops / 9.0e5 + float(random.uniform(2, 9)) + (9 if width % 8 else 0)
        layers.append({
            "name": name if networks else f"/{name}/Conv", "type": "Conv" if name != "fc" else "Gemm",
            "flops": flops, "us": round(us, 2), "in_channels": before, "out_channels": width, "multiple": 8,
            "misses": width % 8 != 0, "next_width": None if width % 8 == 0 else 8 * (width // 8 + 1),
        })  # fmt: skip
        before = width
    flops, time = sum(layer["flops"] for layer in layers), sum(layer["us"] for layer in layers)
    for layer in layers:
        layer |= {"flops_share": layer["flops"] / flops, "time_share": layer["us"] / time}
    text = (
        "FLOPs fell by 46 % and latency by 31 %: 2 of 14 layers miss the multiple of 8 channels, and layers "
        "without FLOPs take 9 % of the time"
    )
    return {"layers": layers, "other_us": round(90 * median_ms, 1), "sentence": text}


def _attribution(labels: list[str], networks: bool, accuracy: float) -> dict[str, Any]:
    top1 = {"baseline": 0.9944, "final": 0.9916, "exported": 0.9916, "graph": 0.9889, "device": accuracy}
    where = {
        "baseline": "PyTorch, unpruned", "final": "PyTorch, pruned and fine-tuned",
        "exported": "ONNX Runtime, fp32", "graph": "ONNX Runtime, int8", "device": "the device, int8",
    }  # fmt: skip
    names = [name for name in top1 if networks or name not in ("baseline", "final")]
    chain = [
        {"name": name, "where": where[name], "top1": top1[name] if labels else None, "top5": None} for name in names
    ]
    causes = {"final": "pruning", "exported": "export", "graph": "quantization", "device": "device"}
    changes = {"pruning": (3, 2, 5), "export": (0, 0, 0), "quantization": (2, 1, 4), "device": (1, 0, 1)}
    steps = []
    for first, second in itertools.pairwise(names):
        lost, gained, changed = changes[causes[second]]
        steps.append({
            "from": first, "to": second, "cause": causes[second], "agree": round(1 - changed / 359, 6),
            "lost": lost if labels else None, "gained": gained if labels else None, "changed": changed,
        })  # fmt: skip
    confusion = np.diag([36] * 9 + [35])
    found = []
    for number, (true, said, cause) in enumerate(
        [(8, 1, "pruning"), (9, 3, "pruning"), (8, 3, "quantization"), (4, 9, "quantization"), (2, 7, "device")]
    ):
        confusion[true, true] -= 1
        confusion[true, said] += 1
        found.append({
            "image": true + 10 * number, "label": true if labels else None, "device": said, "expected": true,
            "baseline": true if networks else None, "cause": cause,
        })  # fmt: skip
    return {
        "classes": labels, "images": 359, "chain": chain, "steps": steps,
        "per_class": [
            {"class": name, "images": 36, "baseline": 0.99 if networks else None, "device": accuracy}
            for name in labels
        ],
        "confusion": confusion.tolist() if labels else [], "disagreements": found,
    }  # fmt: skip


def _latency(values: NDArray[np.int64]) -> dict[str, Any]:
    milliseconds = values / 1e6
    needed = {50: 5, 90: 29, 99: 299}
    found: dict[str, Any] = {}
    for percentile, least in needed.items():
        enough = len(values) >= least
        value = float(np.percentile(milliseconds, percentile)) if enough else None
        found[f"p{percentile}"] = figure(value, 0.002 * percentile / 50, None if enough else least)
    found["mean"] = figure(float(milliseconds.mean()), 0.003)
    return found | {"min": float(milliseconds.min()), "max": float(milliseconds.max())}


def _meta(
    rounds: list[dict[str, Any]],
    single: NDArray[np.int64],
    slow: NDArray[np.int64],
    labels: bool,
    accuracy: float,
    staircase: dict[str, Any],
    attribution: dict[str, Any],
    power: bool,
) -> dict[str, Any]:
    scenarios: dict[str, Any] = {
        "SingleStream": {"queries": len(single), "effective": len(single) // 2, "seconds": 10.3}
        | {"latency_ms": _latency(single)}
    }
    if len(slow):
        scenarios["DutyCycle"] = {"queries": len(slow), "effective": len(slow), "seconds": 33.0, "period_ms": 33}
        scenarios["DutyCycle"] |= {"late": 4, "latency_ms": _latency(slow)}
    batches = [{"batch": b, "samples_per_s": figure(rate, 0.01)} for b, rate in ((1, 1910), (8, 2035), (32, 2036))]
    watts = {"watts": figure(26.4), "energy_mj": figure(13.7), "source": "RAPL, package"} if power else None
    sentence = (
        "of 359 images pruning costs 1, quantization 1 and the device 1"
        if labels
        else "the device and the host differ on 1 of 359 images"
    )
    findings = [
        {
            "what": "clocks",
            "text": "cpu0 clock fell from 3,400 to 3,220 MHz while it was measured",
            "hint": "lock the clocks: `clocks: locked` in the target",
        }
    ]
    return {
        "scenario": "SingleStream", "samples": len(single), "confidence": 0.95,
        "method": "order statistics on the effective number of samples; block bootstrap for means",
        "latency_ms": scenarios["SingleStream"]["latency_ms"], "scenarios": scenarios,
        "throughput": batches[-1], "batches": batches, "power": watts,
        "stability": {"stable": False, "findings": findings}, "early_stopping": {"p90": 0.5421, "p99": None},
        "warmup": {"steady": True, "queries": 410, "ms": 220.0}, "load_ms": 52.8, "first_ms": 1.44,
        "overhead_ns": {"p50": 610.0, "p99": 1240.0}, "peak_memory_bytes": 79_749_120,
        "provider": "CPUExecutionProvider", "settings": {"intra_op_num_threads": 1, "inter_op_num_threads": 1},
        "layers": {"checked": 41, "unknown": 0, "other": []}, "notes": [],
        "tuning": {"set": {}, "found": {}},
        "conditions": {"affinity": [1], "nice": -5, "garbage_collection": "off", "memory_locked": True,
                       "notes": ["nice: no permission for less than -5"]},
        "ran": {"provider": "CPUExecutionProvider", "threads": 1, "precision": {"fp32": 20, "int8": 21},
                "fallback": []},
        "not_measured": {} if labels else {"accuracy": "the images have no labels"}, "images": 359,
        "device": {"arch": "x86_64", "cpu": "AMD EPYC", "cores": 2, "os": "Linux 6.18",
                   "runtimes": {"onnxruntime": "1.31.1"}, "gpus": [], "driver": None, "cuda": None, "l4t": None,
                   "jetpack": None, "power_mode": None},
        "accuracy": accuracy if labels else None, "top5": None,
        "agreement": {"images": 359, "top1": 0.9972, "max_absolute": 0.031},
        "attribution": {"chain": attribution["chain"], "steps": attribution["steps"], "sentence": sentence},
        "staircase": {"sentence": staircase["sentence"]},
        "regression": {
            "against": "4fea2f727a4fb5bb",
            "ratio": figure(0.994, 0.012),
            "significant": False,
            "sentence": "no significant difference in latency (-1.8 to +0.6 %)",
        },
        "rounds": rounds,
    }  # fmt: skip


def _document(
    name: str, target: str, made: dict[str, Artifact], fast: bool, status: str, until: str
) -> dict[str, Any]:
    bench = made["bench"].meta if "bench" in made else None
    keys = ("accuracy", "macs", "flops", "params")
    network = {
        label: {key: made[stage].meta[key] for key in keys} if stage in made else None
        for label, stage in (("baseline", "train"), ("pruned", "prune"), ("final", "finetune"))
    }
    texts = {"train": "test accuracy 99.44%, 81.1 MFLOPs", "bench": "p50 / p90 / p99 0.515 / 0.541 / 0.566 ms"}
    stages = [
        {"name": stage, "cached": stage == "data", "seconds": 0.04 if stage == "data" else 12.5,
         "artifact": artifact.digest, "text": texts.get(stage, "")}
        for stage, artifact in made.items()
    ]  # fmt: skip
    judged = until == "commit" and bench is not None
    return {
        "format": FORMAT, "run": name, "target": target, "profile": "host-cpu",
        "workload": {"model": "resnet20" if "train" in made else "onnx:net.onnx",
                     "data": "digits" if bench is None or bench["accuracy"] else "inputs:images.npy", "seed": 123},
        "budget": "60%" if "train" in made else None, "fast": fast, "model": network,
        "engine": {"runtime": "onnxruntime", "precision": "int8", "provider": "CPUExecutionProvider",
                   "bytes": 338_063, "sha256": "06c58600" * 8,
                   "fingerprint": {"runtime": "onnxruntime", "version": "1.31.1", "arch": "x86_64",
                                   "cpu": "AMD EPYC (0c31b8d6)"},
                   "runtimes": {"onnxruntime": bench["latency_ms"]["p50"]}} if bench else None,
        "bench": bench, "verdict": verdict(bench, status) if judged and bench else None,
        "commit": {"committed": status == "passed", "reason": "it kept its contract" if status == "passed" else
                   "the contract is broken; what was current stays", "current": "cec22805e6e8bd0d",
                   "previous": None, "healthy": True, "release": "cec22805e6e8bd0d"} if judged else None,
        "stages": stages, "artifacts": {stage: artifact.key for stage, artifact in made.items()}, "report": None,
        "error": None if judged else {"message": "the disk is full", "hint": "free space"},
    }  # fmt: skip


def verdict(bench: dict[str, Any], status: str = "passed") -> dict[str, Any]:
    """Return a verdict on a measurement: ``failed`` breaks p99, ``undecided`` leaves it open."""
    p99 = bench["latency_ms"]["p99"]
    limit = {"passed": 20.0, "failed": 0.9 * (p99["low"] or 1), "undecided": p99["value"] or 1}[status]
    reason = {"passed": "within the limit", "failed": "above the limit", "undecided": "the interval lies across it"}
    rate = bench["throughput"]["samples_per_s"]
    rows = [
        ("latency p99", limit, p99["value"], p99["low"], p99["high"], "ms", status, reason[status]),
        ("throughput", 200.0, rate["value"], rate["low"], rate["high"], "samples/s", "passed", "above the limit"),
        ("peak memory", 3e8, 79_749_120, None, None, "bytes", "passed", "220.25 MB within the limit of 300.00 MB"),
    ]
    if bench["accuracy"] is not None:
        drop = 0.9944 - bench["accuracy"]
        rows.append(("accuracy drop", 0.02, drop, drop - 0.004, drop + 0.004, "", "passed", "within the limit"))
    keys = ("what", "limit", "measured", "low", "high", "unit", "status", "reason")
    lines = [dict(zip(keys, row, strict=True)) | {"passed": row[6] == "passed"} for row in rows]
    return {"status": status, "passed": status == "passed", "lines": lines}


def load(build: Path, name: str) -> dict[str, Any]:
    """Return the document of a run."""
    document: dict[str, Any] = json.loads((build / "runs" / name / "run.json").read_text())
    return document
