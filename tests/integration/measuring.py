"""A small network, built and measured by the agent on a device."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from toolkit.agent.releases import identity
from toolkit.delivery import release as delivery
from toolkit.delivery.release import Release
from toolkit.devices import Device
from toolkit.devices.agent import Agent

SIZE = 8
SETTINGS = {
    "warmup_ms": 10,
    "scenarios": [
        {"name": "SingleStream", "duration_ms": 50, "queries": 20},
        {"name": "Offline", "batch": 4, "duration_ms": 50},
        {"name": "DutyCycle", "period_ms": 5, "duration_ms": 50},
    ],
    "evaluate": True,
    "profile": False,
    "tuning": {"power_mode": None, "clocks": None, "sudo": False},
}


def network(path: Path) -> None:
    """Write a network that calls an image 1 when it is bright: uint8 ``(N, 3, 8, 8)`` to logits ``(N, 2)``."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "last"], ["column"]),
        helper.make_node("Sub", ["threshold", "column"], ["darkness"]),
        helper.make_node("Concat", ["darkness", "column"], ["logits"], axis=1),
    ]
    constants = [
        helper.make_tensor("last", TensorProto.INT64, [1], [1]),
        helper.make_tensor("threshold", TensorProto.FLOAT, [1], [255.0]),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, SIZE, SIZE])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2])]
    graph = helper.make_graph(nodes, "brightness", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def deliver(device: Device, folder: Path) -> Release:
    """Build the network on a device, and push it there as a release."""
    agent = Agent(device)
    network(folder / "model.onnx")
    place = f"{device.root}/building"
    device.put(folder / "model.onnx", f"{place}/model.onnx")
    image = {"name": "images", "shape": [3, SIZE, SIZE]}
    asked = {"runtime": "onnxruntime", "precision": "fp32", "threads": 1, "input": image, "batches": None}
    built = agent.ask("build", asked | {"onnx": f"{place}/model.onnx", "out": place, "root": device.root})
    sources = {name: folder / name for name in (built["file"], "engine.json")}
    for name, path in sources.items():
        device.get(f"{place}/{name}", path)
    labels = np.arange(64) % 2
    images = np.broadcast_to(labels[:, None, None, None] * 200 + 20, (64, 3, SIZE, SIZE)).astype(np.uint8)
    for name, array in (("images", images), ("labels", labels)):
        path = sources[f"evaluation/{name}.npy"] = folder / f"{name}.npy"
        np.save(path, array)
    files = {
        name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for name, path in sources.items()
    }
    manifest: dict[str, Any] = {"files": files}
    release = Release(manifest | {"id": identity(manifest)}, sources, {})
    delivery.push(release, agent)
    return release


def measure(device: Device, folder: Path, **settings: Any) -> dict[str, Any]:
    """Build the network on a device, push it as a release, and return the agent's measurement."""
    release = deliver(device, folder)
    return delivery.bench(release, Agent(device), SETTINGS | settings, folder, lambda done, total, text: None)
