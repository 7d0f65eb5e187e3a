"""What the tests of engines share: small graphs, requests, and stand-ins for a device with TensorRT and CUDA."""

from __future__ import annotations

import importlib
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from toolkit import graphs
from toolkit.agent import facts, trt

STANDINS = Path(__file__).parent / "standins"
VERSIONS = ("8.5", "8.6", "10.3", "10.16", "11.0")
PRECISIONS = ("fp32", "fp16", "int8")
A100 = {"name": "NVIDIA A100-SXM4-40GB", "compute_capability": "sm_80", "memory_bytes": 40 << 30}
T4 = {"name": "Tesla T4", "compute_capability": "sm_75", "memory_bytes": 16 << 30}
ORIN = {"name": "NVIDIA Jetson AGX Orin", "compute_capability": "sm_87", "memory_bytes": 32 << 30}
_MODULES = ("tensorrt", "cuda", "cuda.bindings", "cuda.bindings.runtime", "pycuda", "pycuda.driver", "standin_gpu")
BATCHES = {"min": 1, "opt": 4, "max": 8}
SHAPE = [3, 8, 8]


def environment(version: str, gpu: dict[str, Any] | None, *parts: str) -> dict[str, str]:
    """Return the environment of a process that has the stand-ins named."""
    return {
        "PYTHONPATH": os.pathsep.join(str(STANDINS / part) for part in ("gpu", *parts)),
        "TENSORRT_STANDIN": version,
        "TENSORRT_STANDIN_GPU": f"{gpu['name']}, {gpu['compute_capability']}" if gpu else "",
    }


def play(
    monkeypatch: pytest.MonkeyPatch,
    version: str = "10.3",
    gpu: dict[str, Any] | None = A100,
    library: str | None = "cuda_python",
    **here: Any,
) -> Any:
    """Play a device in this process and return its ``tensorrt``; ``here`` are facts that differ."""
    for name, value in environment(version, gpu).items():
        monkeypatch.setenv(name, value)
    for part in ("gpu", "tensorrt_api", library):
        if part is not None:
            monkeypatch.syspath_prepend(STANDINS / part)
    for name in _MODULES:  # set before it is deleted, so that the test's end deletes what the test has imported
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    if library != "cuda_python":
        monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setattr(trt, "_LOGS", {})
    tensorrt = importlib.import_module("tensorrt")
    orin = gpu is not None and gpu["compute_capability"] == "sm_87"
    told = facts.collect({"root": "/"}) | {
        "runtimes": {"tensorrt": tensorrt.__version__},
        "gpus": [gpu] if gpu else [],
        "tensorrt_python": True,
        "l4t": "36.4.3" if orin else None,
        "jetpack": "6.2" if orin else None,
        "power_mode": "MAXN" if orin else None,
    }
    monkeypatch.setattr(facts, "collect", lambda request: told | here)
    return tensorrt


def graph(
    path: Path, precision: str = "fp32", *, batch: int | str = "batch", output: str = "fp32", size: int | str = 8
) -> Path:
    """Write a network of uint8 ``images`` with a convolution ``features.conv`` and a classifier ``head``."""
    random = np.random.default_rng(0)
    half = precision == "fp16"
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    weights = {
        "features.conv.weight": random.normal(0, 0.3, (8, 3, 3, 3)),
        "features.conv.bias": random.normal(0, 0.3, 8),
        "head.weight": random.normal(0, 0.3, (8, 10)),
        "head.bias": random.normal(0, 0.3, 10),
        "scale": np.array(1 / 255),
    }
    constants = [
        numpy_helper.from_array(value.astype(np.float16 if half else np.float32), name)
        for name, value in weights.items()
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], "preprocessing.cast", to=kind),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"], "preprocessing.scale"),
    ]

    def operands(*names: str) -> list[str]:
        if precision != "int8":
            return list(names)
        for name in names:
            nodes.append(
                helper.make_node("QuantizeLinear", [name, "step", "zero"], [f"{name}_q"], f"{name}_quantize")
            )
            nodes.append(
                helper.make_node(
                    "DequantizeLinear", [f"{name}_q", "step", "zero"], [f"{name}_dq"], f"{name}_dequantize"
                )
            )
        return [f"{name}_dq" for name in names]

    if precision == "int8":
        constants += [
            numpy_helper.from_array(np.array(0.02, np.float32), "step"),
            numpy_helper.from_array(np.array(0, np.int8), "zero"),
        ]
    inputs = operands("scaled", "features.conv.weight")
    nodes += [
        helper.make_node("Conv", [*inputs, "features.conv.bias"], ["conv"], "features.conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["activated"], "features.relu"),
        helper.make_node("GlobalAveragePool", ["activated"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
    ]
    inputs = operands("flat", "head.weight")
    wanted = TensorProto.FLOAT16 if output == "fp16" else TensorProto.FLOAT
    last = "logits" if kind == wanted else "head"
    nodes.append(helper.make_node("Gemm", [*inputs, "head.bias"], [last], "head"))
    if last != "logits":
        nodes.append(helper.make_node("Cast", [last], ["logits"], "cast", to=wanted))
    return write(path, nodes, constants, shape=[batch, 3, size, size], output=(wanted, [batch, 10]))


def write(
    path: Path, nodes: list[Any], constants: list[Any], *, shape: list[Any], output: tuple[int, list[Any]]
) -> Path:
    """Write a graph from uint8 ``images`` to ``logits``."""
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, shape)
    logits = helper.make_tensor_value_info("logits", *output)
    body = helper.make_graph(nodes, "graph", [images], [logits], constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def request(folder: Path, model: Path, precision: str = "fp32", **changes: Any) -> dict[str, Any]:
    """Return a build request; ``changes`` replace its keys, or those of its options."""
    options: dict[str, Any] = dict.fromkeys(
        ("workspace_bytes", "optimization_level", "dla_core", "hardware_compatibility", "compute_capabilities")
    )
    asked = {
        "runtime": "tensorrt",
        "root": str(folder / "root"),
        "onnx": str(model),
        "out": str(folder),
        "precision": precision,
        "input": {"name": "images", "shape": SHAPE},
        "batches": BATCHES,
        "expected": graphs.precisions(model),
        "options": options,
    }
    for key, value in changes.items():
        (options if key in options else asked)[key] = value
    return asked


def about(plan: bytes) -> dict[str, Any]:
    """Return what a plan of the stand-in says of itself."""
    (length,) = struct.unpack_from("<I", plan, 28)
    document: dict[str, Any] = json.loads(plan[32 : 32 + length])
    return document


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *SHAPE), np.uint8)


def reference(model: Path, batch: np.ndarray) -> np.ndarray:
    """Return ONNX Runtime's logits."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(None, {"images": batch})[0]
    return logits
