"""How long a release of 5 MB takes to 50 devices: pushed, verified there, switched to with a health check.

    python benchmarks/fleet.py [HOSTS] [PARALLEL]

The devices are users of one OpenSSH server on this machine (root and /usr/sbin/sshd needed), so that both ends
share its cores. Beside it: what OpenSSH takes to write the same bytes there, nothing verified and nothing switched.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from tests.sshd import Server
from toolkit import engines
from toolkit.config import Target
from toolkit.delivery import fleet, release, upkeep
from toolkit.devices import open_device
from toolkit.devices.agent import Agent
from toolkit.devices.local import LocalDevice
from toolkit.store import Artifact, Store, Work

MEGABYTES = 5
SIZE = 32
# in a process of its own, so that the memory of this one is what a push takes
MODEL = """
import sys
from onnx import TensorProto, helper, save
image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 3, 32, 32])
logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])
nodes = [helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
         helper.make_node("ReduceMean", ["x"], ["logits"], axes=[2, 3], keepdims=0)]
graph = helper.make_graph(nodes, "means", [image], [logits])
save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), sys.argv[1])
"""


def make(store: Store, name: str, write: Callable[[Work], dict[str, Any]]) -> Artifact:
    return store.produce(name, name, write, config={}, inputs={})


def composed(folder: Path, target: Target) -> release.Release:
    store = Store(folder / "store")
    order = engines.Order(
        target, "fp32", {"name": "image", "shape": [3, SIZE, SIZE]}, {"min": 1, "opt": 1, "max": 8}
    )

    def graph(work: Work) -> dict[str, Any]:
        subprocess.run([sys.executable, "-c", MODEL, str(work.out / "model.onnx")], check=True)
        return {}

    def data(work: Work) -> dict[str, Any]:
        count = MEGABYTES * 1_000_000 // (3 * SIZE * SIZE)
        random = np.random.default_rng(0)
        np.save(work.out / "test.images.npy", random.integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8))
        return {"classes": ["red", "green", "blue"], "input_size": SIZE}

    drawn = make(store, "graph", graph)
    builder = LocalDevice(folder / "builder")
    engine = make(store, "build", lambda work: engines.build(work, drawn, order, builder, folder / "timing"))
    return release.compose(engine, make(store, "data", data), about={}, fast=False)


def timed(hosts: list[str], work: Callable[[str], object], parallel: int) -> float:
    started = time.perf_counter()
    for result in fleet.each(hosts, work, parallel).values():
        if isinstance(result, Exception):
            raise result
    return time.perf_counter() - started


def main(count: int, parallel: int) -> None:
    hosts = [f"device{number}" for number in range(count)]
    target = Target(name="fleet", profile="none", runtime="onnxruntime", python=sys.executable)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(folder / "ssh", hosts)
        os.environ["TOOLKIT_SSH_CONFIG"] = str(server.config)
        os.environ.pop("SSH_AUTH_SOCK", None)
        delivered = composed(folder, target)
        size = sum(entry["bytes"] for entry in delivered.manifest["files"].values())
        (folder / "bytes").write_bytes(os.urandom(size))

        def push(host: str) -> release.Pushed:
            return release.push(delivered, Agent(open_device(host, target, folder)))

        def deliver(host: str) -> None:
            assert push(host).sent_bytes == size
            upkeep.activate(delivered.id, Agent(open_device(host, target, folder)))

        def copy(host: str) -> None:
            command = ["ssh", "-F", str(server.config), host, "cat > copied"]
            with (folder / "bytes").open("rb") as content:
                subprocess.run(command, stdin=content, check=True)

        server.start()
        try:
            copied = timed(hosts, copy, parallel)
            before = time.process_time()
            seconds = timed(hosts, deliver, parallel)
            own = time.process_time() - before
            unchanged = timed(hosts, push, parallel)
        finally:
            server.stop()
        for host in hosts:
            current = server.home(host) / ".toolkit" / "current"
            assert current.resolve(strict=True).name == delivered.id
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count} hosts, {parallel} at a time, {size / 1e6:.2f} MB each, on {os.cpu_count()} cores")
    print(f"pushed, verified and switched   {seconds:6.1f} s, of which this process computed {own:.1f} s")
    print(f"pushed again, unchanged         {unchanged:6.1f} s")
    print(
        f"ssh HOST 'cat > FILE'           {copied:6.1f} s: the delivery takes {seconds / copied:.1f} times as long"
    )
    print(f"peak memory of this process     {memory:6.0f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50, int(sys.argv[2]) if len(sys.argv) > 2 else 8)
