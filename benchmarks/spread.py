"""How far apart the p50 of separate runs lies: the agent's benchmark, and a plain mean of 20 queries.

    python benchmarks/spread.py [RUNS] [MODEL.onnx]

MODEL.onnx is an fp32 graph that the toolkit exported; by default a ResNet20 with random weights. The two kinds in
turns, 10 of each by default; ONNX Runtime, one thread, batch 1. The benchmark is what profiles ask for by default:
so many rounds, a process each, which share the duration; its p50 is that of all their queries. The plain mean is a
tutorial's: a session with one thread, a query that does not count, the clock around 20 more of the same image.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.agreement import build, export
from toolkit.config import Benchmark
from toolkit.devices.agent import Agent
from toolkit.devices.local import LocalDevice

DEFAULT = Benchmark()
ORDER = {
    "warmup_ms": DEFAULT.warmup,
    "scenarios": [
        {
            "name": "SingleStream",
            "duration_ms": DEFAULT.duration / DEFAULT.rounds,
            "queries": math.ceil(DEFAULT.queries / DEFAULT.rounds),
        }
    ],
    "evaluate": False,
    "profile": False,
    "tuning": {"power_mode": None, "clocks": None, "sudo": False},
}
PLAIN = """
import sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
image = np.load(sys.argv[2])[:1]
name = session.get_inputs()[0].name
session.run(None, {name: image})
taken = []
for _ in range(20):
    start = time.perf_counter()
    session.run(None, {name: image})
    taken.append(time.perf_counter() - start)
print(sum(taken) / len(taken) * 1e3)
"""


def plain(engine: Path, images: Path) -> float:
    """Return a plain mean in milliseconds."""
    command = [sys.executable, "-c", PLAIN, engine, images]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def benchmarked(agent: Agent, request: dict[str, Any]) -> float:
    """Return the p50 of a benchmark in milliseconds."""
    taken = []
    for _ in range(DEFAULT.rounds):
        agent.ask("bench", request)
        taken.append(np.load(Path(request["out"]) / "SingleStream.npy"))
    return float(np.median(np.concatenate(taken))) / 1e6


def tell(name: str, found: list[float]) -> float:
    spread = float(np.std(found, ddof=1) / np.mean(found))
    reach = (max(found) - min(found)) / float(np.mean(found))
    print(f"{name}: mean {np.mean(found):.4f} ms, standard deviation {spread:.2%}, from least to most {reach:.2%}")
    return spread


def main(runs: int, model: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is None:
            export(model := folder / "model.onnx")
        release = folder / "release"
        engine, shape = build(model, "onnxruntime", release)
        images = release / "evaluation" / "images.npy"
        images.parent.mkdir()
        np.save(images, np.random.default_rng(0).integers(0, 256, (256, *shape), np.uint8))
        device = LocalDevice(folder / "device")
        Path(device.root).mkdir()
        request = ORDER | {"root": device.root, "release": str(release), "out": str(folder / "out")}
        ours, plainly = [], []
        for _ in range(runs):
            ours.append(benchmarked(Agent(device), request))
            plainly.append(plain(engine, images))
        ratio = tell("the agent's p50", ours) / tell("a plain mean of 20", plainly)
        print(f"ratio of the standard deviations: {ratio:.2f}")


if __name__ == "__main__":
    chosen = Path(sys.argv[2]).absolute() if len(sys.argv) > 2 else None
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10, chosen)
