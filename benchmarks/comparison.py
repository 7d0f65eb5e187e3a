"""How often a comparison finds a difference: of an engine with itself, and with itself made 3, 5 and 10 % slower.

    python benchmarks/comparison.py [COMPARISONS] [MODEL.onnx]

50 comparisons by default, of a ResNet20 with random weights, on ONNX Runtime; the slower ones are done in the first
10 of them. Every comparison has as many processes of the agent's loop, each as long, as `toolkit compare` has. A
query is made slower by waiting, busily, for that share of the time that it took.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from toolkit.bench.comparison import DURATION_MS, LEVEL, PROCESSES, compare

SLOWER = (0.0, 0.03, 0.05, 0.1)
INJECTED = 10
WARMUP_MS = 10_000

Query = Callable[[], object]


def export(path: Path) -> None:
    import torch

    from toolkit.compression.models import ResNet20

    image = torch.zeros(1, 3, 32, 32)
    torch.onnx.export(
        ResNet20(10).eval(), (image,), str(path), input_names=["image"], opset_version=17, dynamo=False
    )


def slowed(query: Query, share: float) -> Query:
    clock = time.perf_counter_ns

    def slow() -> None:
        start = clock()
        query()
        end = start + int((clock() - start) * (1 + share))
        while clock() < end:
            pass

    return slow


def process(model: str, out: Path, seed: int, injected: bool) -> None:
    """Measure the model against itself, and against itself made slower, as the agent does in one process."""
    from toolkit.agent import compare, conditions, warmup
    from toolkit.agent.ort import Session

    chance = random.Random(seed)
    images = np.random.default_rng(seed).normal(size=(64, 3, 32, 32)).astype(np.float32)
    sessions = [Session(model, 1, optimize=True) for _ in range(2)]
    chance.shuffle(sessions)
    a, b = ([session.prepare(images[i : i + 1]) for i in range(64)] for session in sessions)
    with conditions.quiet(1):
        for queries in (a, b):
            warmup.until_steady(itertools.cycle(queries), WARMUP_MS)
        for share in SLOWER if injected else SLOWER[:1]:
            sides = [slowed(query, 0) for query in a], [slowed(query, share) for query in b]
            taken, bursts = compare.in_turns(sides, DURATION_MS, None, chance)
            folder = out / f"{share:g}"
            folder.mkdir(parents=True)
            for name, times in (("a", taken[0]), ("b", taken[1]), ("bursts", bursts)):
                np.save(folder / f"{name}.npy", times)


def main(comparisons: int, model: Path | None) -> None:
    found: dict[float, list[bool]] = {share: [] for share in SLOWER}
    widths = []
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if model is None:
            model = folder / "model.onnx"
            export(model)
        for number in range(comparisons):
            outs = [folder / f"{number}-{index}" for index in range(PROCESSES)]
            for out in outs:
                seed = str(random.getrandbits(32))
                injected = "injected" if number < INJECTED else "null"
                command = [sys.executable, __file__, "--process", model, out, seed, injected]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # the agent's progress
            for share in SLOWER if number < INJECTED else SLOWER[:1]:
                result = compare([out / f"{share:g}" for out in outs])
                found[share].append(result["significant"])
                widths.append((result["ratio"]["high"] / result["ratio"]["low"] - 1) / 2)
                print(f"{number + 1}/{comparisons} {share:4.0%} slower: {result['sentence']}", file=sys.stderr)
    each = (time.monotonic() - began) / comparisons
    print(f"{PROCESSES} processes of {DURATION_MS / 1e3:g} s; half an interval is {np.median(widths):.2%} (median)")
    for share, outcomes in found.items():
        what = f"{share:.0%} slower" if share else f"itself, at a level of {LEVEL:.0%}"
        print(f"{what}: significant in {sum(outcomes)} of {len(outcomes)}")
    print(f"{each:.0f} s a comparison, the slower ones included")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        process(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "injected")
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 50, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
