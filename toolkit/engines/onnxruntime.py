"""ONNX Runtime: the agent optimises the graph for the machine it will run on."""

from __future__ import annotations

from typing import Any

from toolkit.config import Precision, Target
from toolkit.devices.agent import Agent
from toolkit.store import Artifact, Work

FILES = ("model.optimized.onnx", "engine.json")


def build(
    work: Work, graph: Artifact, target: Target, agent: Agent, precision: Precision, input_size: int
) -> dict[str, Any]:
    """Write ``model.optimized.onnx`` and ``engine.json``; see the agent's ``engine.build``.

    Returns:
        The content of ``engine.json`` and ``bytes``, the size of the engine.
    """
    device = agent.device
    folder = f"{device.root}/building/{graph.digest[:16]}"
    try:
        device.put(graph.file("model.onnx"), f"{folder}/model.onnx")
        request = {
            "onnx": f"{folder}/model.onnx",
            "out": folder,
            "threads": target.threads,
            "precision": precision,
            "input_size": input_size,
            "batch": 2 if graph.meta["batch"] == "dynamic" else 1,
        }
        engine = agent.ask("build", request, progress=work.progress)
        for name in FILES:
            device.get(f"{folder}/{name}", work.out / name)
    finally:
        device.remove(folder)
    return engine | {"bytes": (work.out / engine["file"]).stat().st_size}
