"""How long each layer of an engine takes, as the runtime itself tells, in a run apart from the timed ones."""

from __future__ import annotations

import json
import os
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Dict

import numpy as np

from . import ov, trtexec
from .layers import mentions
from .protocol import OutOfMemory, Refusal, progress

_WARM_UP, _QUERIES, _SECONDS = 20, 200, 10.0  # the profile ends after so many queries, or after so many seconds
_LEAST = 10
_ONNX_NODE = re.compile(
    r"\[ONNX Layer: ([^\]|]+?)(?: \|[^\]]*)?\]"
)  # onnx-tensorrt, ImporterContext::registerLayer

Times = Dict[str, float]  # name of a layer to its microseconds in a query; subscripted when Python 3.8 runs it


def layers(release: str, description: dict[str, Any], session: Any, images: np.ndarray) -> dict[str, Any]:
    """Time the layers of a release's engine, one image at a time.

    Args:
        release: Its folder.
        description: What ``engine.json`` says.
        session: The loaded engine; None where only trtexec can run it.
        images: uint8 ``(K, C, H, W)``, rotated through; trtexec takes random ones.

    Returns:
        ``layers``: ``name``, ``type``, ``us`` (median microseconds a query) and ``nodes`` (names of the ONNX nodes
        that it stands for, where the runtime tells) of each, in order; None where it cannot be had.
        ``ran``: what ONNX Runtime ran: ``precision`` (how many convolutions and matrix products in each) and
        ``fallback`` (operators on another execution provider than the engine's); None for other runtimes.
        ``notes``: why something could not be had.
    """
    progress(0, 0, "timing the layers")
    queries = _queries(images)
    path = os.path.join(release, description["file"])
    try:
        if description["runtime"] == "onnxruntime":
            return _onnxruntime(path, description, queries)
        if description["runtime"] == "openvino":
            rows = ov.profile(path, description, list(queries))
        else:
            rows = _tensorrt(session, description, queries) if session else _trtexec(path, description)
    except (OutOfMemory, Refusal) as problem:
        return {"layers": None, "ran": None, "notes": ["the layers were not timed: {}".format(problem)]}
    return {"layers": rows, "ran": None, "notes": []}


def _queries(images: np.ndarray) -> Iterator[np.ndarray]:
    """Yield images ``(1, C, H, W)``, ``_QUERIES`` after the warm-up or as many as the time allows."""
    end = time.monotonic() + _SECONDS
    for count in range(_WARM_UP + _QUERIES):
        if count >= _LEAST and time.monotonic() > end:
            return
        yield np.array(images[count % len(images)][None])


def _medians(queries: list[Times]) -> Times:
    """Return each layer's median over the queries after the warm-up."""
    steady = queries[min(_WARM_UP, len(queries) // 2) :]
    names = dict.fromkeys(name for times in steady for name in times)  # a branch is not taken every time
    return {name: statistics.median(times.get(name, 0.0) for times in steady) for name in names}


def _onnxruntime(path: str, description: dict[str, Any], queries: Iterator[np.ndarray]) -> dict[str, Any]:
    """Run the engine in a second session, with ONNX Runtime's profiler."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = description["settings"]["intra_op_num_threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was optimised at the build
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = os.path.join(scratch, "trace")
        session = ort.InferenceSession(path, options, providers=[description["provider"]])
        name = session.get_inputs()[0].name
        for images in queries:
            session.run(None, {name: images})
        trace = session.end_profiling()
        del session
        with open(trace, encoding="utf-8") as file:
            return _read_trace(file, description["provider"])


def _read_trace(file: Iterator[str], provider: str) -> dict[str, Any]:
    """Return what ONNX Runtime's trace says: an event a line, and ``model_run`` after those of a query."""
    runs: list[Times] = []
    current: Counter[str] = Counter()  # a node within a loop runs several times
    nodes: dict[str, dict[str, Any]] = {}
    for line in file:
        event = json.loads(line.strip().strip("[],") or "{}")
        if event.get("name") == "model_run":
            runs.append(dict(current))
            current.clear()
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            told = event["args"]
            name = event["name"][: -len("_kernel_time")] or "{} {}".format(told["op_name"], told["node_index"])
            current[name] += event["dur"]
            nodes[name] = told
    elsewhere = {told["op_name"] for told in nodes.values() if told["provider"] != provider}
    precisions = (_precision(told) for told in nodes.values())
    return {
        "layers": [
            {"name": name, "type": nodes[name]["op_name"], "us": us, "nodes": _exported(name)}
            for name, us in _medians(runs).items()
        ],
        "ran": {"precision": dict(Counter(p for p in precisions if p)), "fallback": sorted(elsewhere)},
        "notes": [],
    }


# as the trace spells the types of tensors
_PRECISIONS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}


def _precision(told: dict[str, Any]) -> str | None:
    """Return the precision of a convolution or matrix product by its first input; None for other operators."""
    if not re.search("Conv|Gemm|MatMul", told["op_name"]):
        return None
    return _PRECISIONS.get(next(iter(told["input_type_shape"][0])))


def _exported(name: str) -> list[str]:
    """Return the node of the exported graph that an optimised node's name tells: the last of those it stands for.

    What ONNX Runtime has put in is called ``..._token_7`` or after its operator; a convolution in its blocked
    layout after the tensor that it writes, which the exporter has called after its node.
    """
    if re.search(r"_token_\d+$", name) or name in ("ReorderInput", "ReorderOutput"):
        return []
    blocked = re.match(r"(.*)_output_\d+_nchwc$", name)
    return [blocked.group(1) if blocked else name]


def _tensorrt(session: Any, description: dict[str, Any], queries: Iterator[np.ndarray]) -> list[dict[str, Any]]:
    """Run the engine with TensorRT's profiler."""
    runs, information = session.profile(queries)
    return _rows(_medians(runs), information, description)


def _trtexec(path: str, description: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the engine with trtexec's profiler."""
    program = trtexec.find()
    if program is None:
        raise Refusal("there is no trtexec")
    medians, information = trtexec.profile(
        program,
        path,
        network_input=description["input"],
        dynamic=description["batches"] is not None,
        queries=_QUERIES,
    )
    return _rows(medians, information, description)


def _rows(medians: Times, information: dict[str, Any], description: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the layers; the engine inspector's ``information`` says what each is."""
    known = {layer["Name"]: layer for layer in information.get("Layers", []) if isinstance(layer, dict)}
    rows = []
    for name, us in medians.items():
        layer = known.get(name, {"Name": name})
        nodes = _ONNX_NODE.findall(str(layer.get("Metadata", "")))
        nodes = nodes or [node for node in description["expected"] if mentions(layer, node)]
        rows.append({"name": name, "type": layer.get("LayerType", ""), "us": us, "nodes": nodes})
    return rows
