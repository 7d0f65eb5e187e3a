"""Delivery over SSH on loopback: python benchmarks/delivery.py [ROUNDS]; needs root and sshd.

Prints how fast 200 MB travel beside scp, alternating in one run, and what an unchanged push, a push of a changed
engine and a doctor take.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.sshd import Server
from toolkit import doctor
from toolkit.agent.releases import identity
from toolkit.delivery import release as delivery
from toolkit.delivery.release import Release
from toolkit.devices.agent import Agent
from toolkit.devices.ssh import SshDevice
from toolkit.files import load_target

MB = 1_000_000


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def random_file(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    return path


def compose(**sources: Path) -> Release:
    files = {
        name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for name, path in sources.items()
    }
    return Release({"files": files, "id": identity({"files": files})}, dict(sources), {})


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "server")
        os.environ["TOOLKIT_SSH_CONFIG"] = str(server.config)
        server.start()
        try:
            measure(server, Path(folder), rounds)
        finally:
            server.stop()


def measure(server: Server, folder: Path, rounds: int) -> None:
    device = SshDevice("orin", "~/.toolkit", sys.executable)
    agent = Agent(device)
    large, there = random_file(folder / "large", 200 * MB), server.home("orin") / "copy"
    scp = ["scp", "-q", "-F", str(server.config), str(large), f"orin:{there}"]
    pairs = []
    for _ in range(rounds):
        theirs = seconds(lambda: subprocess.run(scp, check=True))
        ours = seconds(lambda: device.upload(large, str(there), 0, lambda count: None))
        assert there.read_bytes() == large.read_bytes()
        pairs.append((theirs, ours))
    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
    told = ", ".join(f"{theirs:.2f}/{ours:.2f}" for theirs, ours in pairs)
    print(f"200 MB: {ratio:.2f} times scp's speed, median of {rounds} pairs (scp/toolkit in s: {told})")

    data = random_file(folder / "images.npy", 100 * MB)
    first = compose(engine=random_file(folder / "one", 20 * MB), images=data)
    second = compose(engine=random_file(folder / "two", 20 * MB), images=data)
    for name, release in (("first", first), ("unchanged", first), ("changed engine", second)):
        started = time.perf_counter()
        sent = delivery.push(release, agent).sent_bytes
        print(f"push, {name}: {time.perf_counter() - started:.2f} s, {sent / MB:.0f} MB sent")

    target = load_target("host-cpu")
    fresh = seconds(lambda: doctor.examine_device(SshDevice("orin", "~/.toolkit", sys.executable), target))
    print(f"doctor, connection included: {fresh:.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
