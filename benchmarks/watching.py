"""What it costs to watch: python benchmarks/watching.py MODEL.onnx [ROUNDS].

Prints what telemetry does to the latency of a network on ONNX Runtime (one thread, on a CPU that the sampler keeps
off), alternating in one run; what CPU time the sampler takes; and how much longer the layers are with ONNX
Runtime's profiler than the query is without.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx

from toolkit.agent import ort, profiles, telemetry

SECONDS, INTERVAL_MS = 4.0, 100


def latencies(session: ort.Session, images: np.ndarray) -> list[int]:
    """Return the nanoseconds of queries, one after another."""
    taken: list[int] = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        query = images[len(taken) % len(images)][None]
        began = time.perf_counter_ns()
        session.run(query)
        taken.append(time.perf_counter_ns() - began)
    return taken


def sampler_seconds() -> float:
    """Return the CPU time of the samplers that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(model: str, rounds: int) -> None:
    graph = onnx.load(model).graph.input[0]
    shape = [dimension.dim_value for dimension in graph.type.tensor_type.shape.dim][1:]
    measured = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [measured])
    images = np.random.default_rng(0).integers(0, 256, (64, *shape), np.uint8)
    p50, p99, profiled, cpu = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "onnx": model,
            "out": folder,
            "threads": 1,
            "precision": "fp32",
            "input": {"name": graph.name, "shape": shape},
            "batches": None,
        }
        description = ort.build(request)
        session = ort.Session(str(Path(folder, ort.MODEL)), 1, optimize=False)
        latencies(session, images)
        for _ in range(rounds):
            alone = latencies(session, images)
            before = sampler_seconds()
            with telemetry.sampled(str(Path(folder, "telemetry.json")), INTERVAL_MS, avoid=[measured]):
                watched = latencies(session, images)
            cpu.append((sampler_seconds() - before) / SECONDS)
            layers = profiles.layers(folder, description, session, images)["layers"]
            median = statistics.median(alone)
            p50.append(statistics.median(watched) / median)
            p99.append(float(np.percentile(watched, 99) / np.percentile(alone, 99)))
            profiled.append(sum(layer["us"] for layer in layers) / (median / 1000))
    for name, ratios in (("p50 watched / alone", p50), ("p99 watched / alone", p99), ("layers / query", profiled)):
        print(f"{name}: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    print(f"layers: {len(layers)}, query: {median / 1000:.0f} µs")
    print(f"sampler: {statistics.median(cpu):.1%} of a CPU, its start included")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8)
