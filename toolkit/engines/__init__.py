"""Runtimes behind one small interface: which Q/DQ they take, and how an engine of theirs is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit import units
from toolkit.agent import builder, caches
from toolkit.agent.engine import ENGINE
from toolkit.config import Precision, Target
from toolkit.devices import Device
from toolkit.devices.agent import Agent
from toolkit.errors import UsageError
from toolkit.store import Artifact, Work

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "fp8")


_FP8_CAPABILITY = 89  # Ada and newer


@dataclass(frozen=True)
class Order:
    """What an engine is built for, beside its graph.

    Attributes:
        target: Runtime and build options.
        precision: Of the graph.
        input: ``name`` and ``shape`` (without the batch) of the image input; None while nobody knows, in a plan.
        batches: ``min``, ``opt``, ``max``; None where the graph's batch is fixed.
    """

    target: Target
    precision: Precision
    input: dict[str, Any] | None
    batches: dict[str, int] | None

    def request(self) -> dict[str, Any]:
        """Return it as the agent's builders take it."""
        target, build = self.target, self.target.build
        ahead = build.compute_capabilities or [str(target.compute_capability)]
        return {
            "runtime": target.runtime,
            "precision": self.precision,
            "input": self.input,
            "batches": self.batches,
            "threads": target.threads,
            "options": {
                "workspace_bytes": int(build.workspace) if build.workspace else None,
                "optimization_level": build.optimization_level,
                "dla_core": build.dla_core,
                "hardware_compatibility": build.hardware_compatibility,
                "compute_capabilities": ahead if target.runtime == "tensorrt-rtx" else None,
            },
        }


def spelling(target: Target) -> Literal["onnxruntime", "tensorrt"]:
    """Return whose Q/DQ a target's runtime takes, or is fastest with (OpenVINO: docs/performance.md)."""
    return "onnxruntime" if target.on_cpu else "tensorrt"


def require_precision(target: Target, precision: Precision) -> None:
    """Raise UsageError when a target's runtime does not compute in a precision."""
    if precision not in PRECISIONS:
        raise UsageError(f"{target.runtime} has no {precision}", units.nearest(precision, list(PRECISIONS)))
    capabilities = target.build.compute_capabilities or [str(target.compute_capability)]
    if precision == "fp8":
        if target.on_cpu:
            raise UsageError(f"{target.runtime} does not compute in fp8 on a CPU", "--precision int8 or fp32")
        older = [name for name in capabilities if int(name[3:]) < _FP8_CAPABILITY]
        if older:
            raise UsageError(
                f"{', '.join(older)} has no fp8, which begins with sm_{_FP8_CAPABILITY}",
                "--precision int8 or fp16",
            )
    if target.runtime == "tensorrt-rtx" and "sm_75" in capabilities:
        if precision != "fp16":
            raise UsageError(
                f"TensorRT for RTX computes on Turing (sm_75) in fp16, not in {precision}",
                "--precision fp16, or --runtime tensorrt on a host with such a GPU",
            )
        if len(capabilities) > 1:
            raise UsageError(
                "TensorRT for RTX builds for Turing (sm_75) alone, not together with "
                + ", ".join(name for name in capabilities if name != "sm_75"),
                "give sm_75 a target of its own",
            )


def identity(order: Order, facts: dict[str, Any]) -> dict[str, Any]:
    """Return what of the place of building goes into an engine; another of these is another engine."""
    runtime = order.target.runtime
    found = {"version": facts["runtimes"].get(runtime)}
    if order.target.on_cpu:
        return found | {"arch": facts["arch"], "cpu": facts["cpu"]}
    if runtime == "tensorrt-rtx":
        return found
    gpu = facts["gpus"][0] if facts["gpus"] else {}
    return found | {
        "gpu": gpu.get("name"),
        "compute_capability": gpu.get("compute_capability"),
        "l4t": facts["l4t"],
        "power_mode": facts["power_mode"],
        "container": facts["container"],
    }


def build(work: Work, graph: Artifact, order: Order, device: Device, copies: Path) -> dict[str, Any]:
    """Have the agent on a device build an engine; it and what belongs to it come back.

    Args:
        work: Output: the engine and ``engine.json``, for TensorRT ``layers.json`` too.
        graph: ``model.onnx`` in the precision that it is built in.
        order: What it is built for.
        device: Where it is built.
        copies: Folder of timing caches on this machine, by the device that they belong to.

    Returns:
        What ``engine.json`` says, and ``bytes``, the size of the engine.
    """
    from toolkit import graphs

    folder = f"{device.root}/building/{graph.digest[:16]}"
    request = order.request() | {
        "root": device.root,
        "onnx": f"{folder}/model.onnx",
        "out": folder,
        "expected": graphs.precisions(graph.file("model.onnx")),
    }
    timing = _TimingCache(device, order, copies)
    try:
        device.put(graph.file("model.onnx"), f"{folder}/model.onnx")
        timing.bring()
        engine = Agent(device).ask("build", request, progress=work.progress)
        for name in (engine["file"], ENGINE, builder.LAYERS):
            if device.exists(f"{folder}/{name}"):
                device.get(f"{folder}/{name}", work.out / name)
        timing.fetch()
    finally:
        device.remove(folder)
    return engine | {"bytes": (work.out / engine["file"]).stat().st_size}


class _TimingCache:
    """A device's timing cache, of which this machine keeps a copy: a device may be set up anew at any time."""

    def __init__(self, device: Device, order: Order, copies: Path) -> None:
        self._device = device
        name = f"{caches.key(order.target.runtime, device.facts())}.timing.cache"
        self._names = (name, f"{name}.sha256") if order.target.runtime == "tensorrt" else ()
        self._here = copies

    def bring(self) -> None:
        """Put the copy on a device that has none."""
        for name in self._names:
            there = f"{self._device.root}/caches/{name}"
            if (self._here / name).exists() and not self._device.exists(there):
                self._device.put(self._here / name, there)

    def fetch(self) -> None:
        """Keep a copy of what the build has left."""
        for name in self._names:
            if self._device.exists(f"{self._device.root}/caches/{name}"):
                self._here.mkdir(parents=True, exist_ok=True)
                self._device.get(f"{self._device.root}/caches/{name}", self._here / name)
