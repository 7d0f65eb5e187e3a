"""A training step of ResNet20 on the CPU, with what PyTorch frees given back to the kernel and kept, in turns.

    python benchmarks/allocation.py [--threads N] [--compiled] [--rounds 5]

Each round is a process of its own, since the C library can be told only once.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

STEPS, BATCH = 20, 128


def measure(threads: int, *, kept: bool, compiled: bool) -> None:
    import torch
    from torch.nn import functional as F

    from toolkit.compression import images, models
    from toolkit.workload import Model

    if not kept:
        images._keep_freed_memory = lambda: None
    torch.set_num_threads(threads)
    hardware = images.Hardware.find()
    network = hardware.place(models.build(Model.parse("resnet20"), 10, 0)).train()
    run = torch.compile(network) if compiled else network
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    inputs = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        with hardware.autocast():
            loss = F.cross_entropy(run(inputs).float(), labels)
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    faults, begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(STEPS):
        step()
    seconds = time.perf_counter() - begin
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    print(STEPS * BATCH / seconds, faults / STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=["kept", "given-back"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        measure(asked.threads, kept=asked.one == "kept", compiled=asked.compiled)
        return
    found: dict[str, list[list[float]]] = {"given-back": [], "kept": []}
    for _ in range(asked.rounds):
        for how, rounds in found.items():
            said = subprocess.run(
                [sys.executable, *sys.argv, "--one", how], check=True, capture_output=True, text=True
            )
            rounds.append([float(word) for word in said.stdout.split()])
            print(f"{how:<11} {rounds[-1][0]:7.0f} images/s, {rounds[-1][1]:7.0f} page faults a step", flush=True)
    pairs = zip(found["kept"], found["given-back"], strict=True)
    ratios = sorted(kept[0] / back[0] for kept, back in pairs)
    print(f"kept: {statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})")


main()
