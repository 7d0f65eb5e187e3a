"""How long an engine takes to build: TensorRT for RTX ahead of time, TensorRT with and without its timing cache.

    python benchmarks/engine_build.py MODEL.onnx [RUNS]

MODEL.onnx is an fp16 graph that the toolkit quantised (build/store/quantize/*/model.onnx). The part with TensorRT
needs TensorRT and a GPU, and says so where they are missing.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from toolkit import graphs
from toolkit.agent import engine, trt
from toolkit.agent.protocol import Refusal

CAPABILITIES = ["sm_80", "sm_86", "sm_89", "sm_120"]


def request(model: Path, runtime: str, root: Path) -> dict[str, Any]:
    import onnx

    image = onnx.load(model).graph.input[0]
    shape = [size.dim_value for size in image.type.tensor_type.shape.dim][1:]
    return {
        "runtime": runtime,
        "root": str(root),
        "onnx": str(model),
        "out": str(root),
        "precision": "fp16",
        "input": {"name": image.name, "shape": shape},
        "batches": {"min": 1, "opt": 1, "max": 32},
        "threads": 1,
        "expected": graphs.precisions(model),
        "options": {"compute_capabilities": CAPABILITIES if runtime == "tensorrt-rtx" else None},
    }


def seconds(asked: dict[str, Any]) -> float:
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # the agent's progress
        engine.build(asked)
    return time.perf_counter() - started


def main(model: Path, runs: int) -> None:
    for runtime in ("tensorrt-rtx", "tensorrt"):
        with tempfile.TemporaryDirectory() as folder:
            asked = request(model, runtime, Path(folder))
            try:
                trt.module(runtime)  # importing it is not building
                first = seconds(asked)
            except Refusal as problem:
                print(f"{runtime}: not measured: {problem.message}")
                continue
            again = statistics.median(seconds(asked) for _ in range(runs))
        if runtime == "tensorrt-rtx":
            print(f"{runtime}: {', '.join(CAPABILITIES)} together: first {first:.2f} s, median {again:.2f} s")
        else:
            print(f"{runtime}: first {first:.2f} s, with its timing cache {again:.2f} s: {first / again:.1f} times")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
