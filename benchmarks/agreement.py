"""What the agent's loop reports, beside loops that have no Python in them.

    python benchmarks/agreement.py [PROCESSES] [MODEL.onnx]

MODEL.onnx is an fp32 graph that the toolkit exported (build/store/export/*/model.onnx); by default a ResNet20 with
random weights. One thread, batch 1, in the conditions of a benchmark.

ONNX Runtime: a loop in C over its C API (bare_loop.c, compiled here with gcc). OpenVINO: the time its C++ takes
around a synchronous inference (`InferRequest.latency`), which is what its own benchmark_app reports. Either has a
session of its own beside the agent's in one process, in pairs of bursts of 10 ms, in random order; a process counts
by the median of its pairs' ratios. Two sessions of one model differ by themselves, so that there are several
processes, 10 by default.

And benchmark_app itself, in turns with the agent's loop, each for 3 s in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import json
import random
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import graphs
from toolkit.agent import conditions, engine, scenarios, warmup

BURST = 10_000_000
PAIRS = 200  # a process
SECONDS = 3
WARMUP_MS = 5000
BENCHMARK_APP = shlex.split("-d CPU -hint none -nstreams 1 -nthreads 1 -infer_precision f32 -b 1 -api sync")


def export(path: Path) -> None:
    import torch

    from toolkit.compression.models import ResNet20

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = ResNet20(10)

        def forward(self, images: Any) -> Any:
            return self.network((images.float() / 255 - 0.5) / 0.25)

    batch = {0: "batch"}
    torch.onnx.export(
        Network().eval(),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8),),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": batch, "logits": batch},
        opset_version=17,
        dynamo=False,
    )


def build(model: Path, runtime: str, folder: Path) -> tuple[Path, list[int]]:
    """Build an engine and return its file and the shape of an image."""
    import onnx

    image = onnx.load(model).graph.input[0]
    shape = [size.dim_value for size in image.type.tensor_type.shape.dim][1:]
    folder.mkdir()
    request = {
        "runtime": runtime,
        "onnx": str(model),
        "out": str(folder),
        "precision": "fp32",
        "input": {"name": image.name, "shape": shape},
        "batches": {"min": 1, "opt": 1, "max": 32},
        "threads": 1,
        "expected": graphs.precisions(model),
    }
    with contextlib.redirect_stdout(io.StringIO()):  # the agent's progress
        return folder / engine.build(request)["file"], shape


def loaded(folder: Path, pool: np.ndarray) -> list[scenarios.Query]:
    return scenarios.prepared(engine.load(str(folder), str(folder)), pool, 1)


def bare(folder: Path, library: str, pool: np.ndarray) -> Callable[[], np.ndarray]:
    """Load the engine of a folder through the C API; what is returned runs it for a burst."""
    import onnxruntime

    (runtime,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    described = json.loads((folder / "engine.json").read_text())
    session = onnxruntime.InferenceSession(str(folder / described["file"]), providers=["CPUExecutionProvider"])
    names = session.get_inputs()[0].name.encode(), session.get_outputs()[0].name.encode()
    answer = session.run(None, {names[0].decode(): pool[:1]})[0]
    logits, taken = np.zeros(answer.shape, np.float32), np.zeros(1 << 20, np.int64)
    shape = (ctypes.c_int64 * 4)(1, *pool.shape[1:])
    loop = ctypes.CDLL(library)
    loop.bare_burst.restype = ctypes.c_int64
    arguments = [
        ctypes.cast(ctypes.CDLL(str(runtime)).OrtGetApiBase, ctypes.c_void_p),
        str(folder / described["file"]).encode(),
        1,
        *names,
        ctypes.c_void_p(pool.ctypes.data),
        ctypes.c_size_t(len(pool)),
        shape,
        ctypes.c_void_p(logits.ctypes.data),
        ctypes.c_int64(logits.size),
    ]
    if loop.bare_open(*arguments):
        sys.exit("the model does not load through the C API")

    def burst() -> np.ndarray:
        count = loop.bare_burst(
            ctypes.c_int64(BURST), ctypes.c_void_p(taken.ctypes.data), ctypes.c_int64(len(taken))
        )
        assert count > 0
        assert arguments, "names and tensors are in use"
        assert (logits != 0).any()
        return taken[:count].copy()

    return burst


def inside(folder: Path, pool: np.ndarray) -> Callable[[], np.ndarray]:
    """Load the engine of a folder with OpenVINO; what is returned runs it for a burst, timed by OpenVINO itself."""
    import openvino

    request = engine.load(str(folder), str(folder)).compiled(1).create_infer_request()
    tensors = itertools.cycle([openvino.Tensor(pool[i : i + 1]) for i in range(len(pool))])

    def burst() -> np.ndarray:
        taken = []
        end = scenarios.time.monotonic_ns() + BURST
        while scenarios.time.monotonic_ns() < end:
            request.set_input_tensor(next(tensors))
            request.infer(share_outputs=True)
            taken.append(request.latency * 1e6)
        return np.array(taken)

    return burst


def process(folder: Path, library: str, seed: int) -> None:
    """Print the median ratio of the agent's p50 to the bare loop's, and their medians in microseconds."""
    chance = random.Random(seed)
    described = json.loads((folder / "engine.json").read_text())
    pool = np.random.default_rng(seed).integers(0, 256, (256, *described["input"]["shape"]), np.uint8)
    theirs = {"onnxruntime": lambda: bare(folder, library, pool), "openvino": lambda: inside(folder, pool)}
    openers: list[Callable[[], Any]] = [lambda: loaded(folder, pool), theirs[described["runtime"]]]
    made: dict[int, Any] = {side: openers[side]() for side in chance.sample((0, 1), 2)}
    cycle, buffer = itertools.cycle(made[0]), scenarios.buffer()

    def ours() -> np.ndarray:
        sent = scenarios.burst(cycle, buffer, 1, scenarios.time.monotonic_ns() + BURST)
        return np.array(buffer[:sent])

    loops = [ours, made[1]]
    found = np.empty((PAIRS, 2))
    with conditions.quiet(1):
        warmup.until_steady(cycle, WARMUP_MS)
        made[1]()
        for pair in found:
            for side in chance.sample((0, 1), 2):
                pair[side] = np.median(loops[side]()) / 1e3
    print(np.median(found[:, 0] / found[:, 1]), *np.median(found, axis=0))


def alone(folder: Path) -> None:
    """Print the agent's p50 in microseconds."""
    shape = json.loads((folder / "engine.json").read_text())["input"]["shape"]
    queries = loaded(folder, np.random.default_rng(0).integers(0, 256, (256, *shape), np.uint8))
    warmup.until_steady(itertools.cycle(queries), WARMUP_MS)
    order = {"name": "SingleStream", "duration_ms": SECONDS * 1000, "queries": 100}
    print(float(np.median(scenarios.run(order, queries)[1])) / 1e3)


def benchmark_app(model: Path) -> float:
    """Return the median that benchmark_app reports, in microseconds."""
    program = Path(sys.executable).with_name("benchmark_app")
    command = [program, "-m", model, "-t", str(SECONDS), *BENCHMARK_APP]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    median = re.search(r"Median: +([\d.]+) (us|ms)", said)
    assert median, said
    return float(median[1]) * (1e3 if median[2] == "ms" else 1)


def tell(name: str, found: list[list[float]]) -> None:
    """Print ratios, each with the two medians in microseconds that it is of."""
    ratios, ours, theirs = np.array(found).T
    print(
        f"{name}: {np.median(ours):.1f} and {np.median(theirs):.1f} µs, median ratio {np.median(ratios):.4f} "
        f"({ratios.min():.4f} to {ratios.max():.4f}, {len(found)} times)"
    )


def again(*arguments: object) -> list[float]:
    """Run a part of this program in a process of its own and return the figures that it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(figure) for figure in said.split()]


def main(processes: int, model: Path | None) -> None:
    noop = scenarios.overhead()
    print(f"a no-op engine: p50 {noop['p50']:.0f} ns, p99 {noop['p99']:.0f} ns a query")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is None:
            export(model := folder / "model.onnx")
        library = folder / "bare_loop.so"
        source = Path(__file__).with_name("bare_loop.c")
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", source, "-o", library], check=True)
        build(model, "onnxruntime", folder / "onnxruntime")
        found = [again("process", folder / "onnxruntime", library, seed) for seed in range(processes)]
        tell("ONNX Runtime, agent and C", found)
        file, _ = build(model, "openvino", folder / "openvino")
        found = [again("process", folder / "openvino", library, seed) for seed in range(processes)]
        tell("OpenVINO, agent and OpenVINO's own clock", found)
        found = []
        with conditions.quiet(1):  # which both inherit
            for turn in range(processes):
                pair = {}
                for side in random.Random(turn).sample((0, 1), 2):
                    pair[side] = benchmark_app(file) if side else again("alone", folder / "openvino")[0]
                found.append([pair[0] / pair[1], pair[0], pair[1]])
        tell("OpenVINO, agent and benchmark_app", found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["process"]:
        process(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1:2] == ["alone"]:
        alone(Path(sys.argv[2]))
    else:
        chosen = Path(sys.argv[2]).absolute() if len(sys.argv) > 2 else None
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 10, chosen)
