"""The runtimes of the CPU beside each other: the same graph, one thread, batch 1, in turns.

    python benchmarks/runtimes.py MODEL.onnx [ROUNDS]

MODEL.onnx is an fp32 graph that the toolkit exported (build/store/export/*/model.onnx). It is quantised in both
spellings of Q/DQ on random images, which do for latency. A round is 50 queries of each engine; a ratio is the
median of the rounds' ratios, with its 10th and 90th percentile.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx

from toolkit import graphs
from toolkit.agent import engine
from toolkit.compression import calibration
from toolkit.compression.spelling import Spelling, spell

QUERIES = 50
# runtime, and the batch size that its engine is tuned for; OpenVINO has one graph for all the others
ENGINES = {"ONNX Runtime": ("onnxruntime", 1), "OpenVINO": ("openvino", 1), "for any batch": ("openvino", 2)}


def load(model: Path, kind: str, precision: str, shape: list[int], folder: Path) -> Any:
    """Return a session of a kind for a graph."""
    runtime, tuned = ENGINES[kind]
    folder.mkdir()
    request = {
        "runtime": runtime,
        "onnx": str(model),
        "out": str(folder),
        "precision": precision,
        "input": {"name": "images", "shape": shape},
        "batches": {"min": 1, "opt": tuned, "max": 32},
        "threads": 1,
        "expected": graphs.precisions(model),
    }
    with contextlib.redirect_stdout(io.StringIO()):  # the agent's progress
        engine.build(request)
    return engine.load(str(folder), str(folder))


def timed(run: Callable[[np.ndarray], Any], queries: list[np.ndarray]) -> float:
    """Return the median milliseconds of a query."""
    taken = []
    for query in queries:
        began = time.perf_counter_ns()
        run(query)
        taken.append(time.perf_counter_ns() - began)
    return float(np.median(taken)) / 1e6


def main(model: Path, rounds: int) -> None:
    shape = [size.dim_value for size in onnx.load(model).graph.input[0].type.tensor_type.shape.dim][1:]
    images = np.random.default_rng(0).integers(0, 256, (QUERIES, *shape), np.uint8)
    queries = [np.array(image[None]) for image in images]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variants = {"fp32": (model, "fp32")}
        prepared = calibration.prepare(model)
        ranges = calibration.calibrate(prepared, images, 32)["minmax"]
        for spelling in get_args(Spelling):
            path = folder / f"{spelling}.onnx"
            onnx.save(spell(prepared, ranges, spelling, "int8"), path)
            variants[f"int8, spelled for {spelling}"] = (path, "int8")
        sessions = {
            (variant, kind): load(graph, kind, precision, shape, folder / f"{kind} {variant}")
            for variant, (graph, precision) in variants.items()
            for kind in ENGINES
        }
        for session in sessions.values():
            timed(session.run, queries)
        found = {key: np.empty(rounds) for key in sessions}
        for turn in range(rounds):
            for key, session in sessions.items():
                found[key][turn] = timed(session.run, queries)
    for variant in variants:
        print(f"{variant}: {', '.join(f'{kind} {np.median(found[variant, kind]):.3f} ms' for kind in ENGINES)}")
        low, ratio, high = np.percentile(found[variant, "OpenVINO"] / found[variant, "ONNX Runtime"], [10, 50, 90])
        print(f"    OpenVINO to ONNX Runtime: {ratio:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 40)
