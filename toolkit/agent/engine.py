"""Engines: build one from ONNX, load one, run it. One runtime so far: ONNX Runtime."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import numpy as np

from . import facts
from .protocol import Refusal, progress

ENGINE = "engine.json"


def fingerprint() -> dict[str, Any]:
    """Return what an engine depends on: it is built for these and refused on others."""
    return {
        "onnxruntime": facts.runtimes().get("onnxruntime"),
        "arch": platform.machine(),
        "cpu": facts.cpu(),
    }


class Session:
    """A loaded engine.

    Args:
        path: The model file.
        threads: Threads within one operator.
        optimize: Whether ONNX Runtime optimises the graph (at build), or takes it as it is (at load).
        save_to: Where to keep the optimised graph.
    """

    def __init__(self, path: str, threads: int, optimize: bool, save_to: str | None = None) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise Refusal(
                "ONNX Runtime cannot be imported on the device: {}".format(error),
                "install onnxruntime and numpy for the device's Python",
            ) from error
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        if save_to is not None:
            options.optimized_model_filepath = save_to
        wanted = ["CPUExecutionProvider"]
        try:
            self._session = ort.InferenceSession(path, options, providers=wanted)
        except Exception as error:
            raise Refusal(
                "ONNX Runtime does not take {}: {}".format(os.path.basename(path), str(error).splitlines()[0]),
                "build it again (--rerun build)",
            ) from error
        self.provider = self._session.get_providers()[0]
        if self.provider != wanted[0]:
            raise Refusal("asked for {} and got {}".format(wanted[0], self.provider), "install that provider")
        self._input = self._session.get_inputs()[0].name
        self._output = [self._session.get_outputs()[0].name]

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return logits ``(B, classes)`` float32 of uint8 images ``(B, 3, S, S)``."""
        logits: np.ndarray = self._session.run(self._output, {self._input: images})[0]
        return logits


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build an engine from an ONNX file.

    Args:
        request: ``onnx`` (path), ``out`` (folder), ``threads``, ``precision``, ``input_size``, ``batch`` (of the
            trial run).

    Returns:
        What is written to ``engine.json`` beside the engine: runtime, file, provider, session settings,
        precision and fingerprint.
    """
    progress(0, 1, "optimising the graph")
    name = "model.optimized.onnx"
    path = os.path.join(request["out"], name)
    session = Session(request["onnx"], request["threads"], optimize=True, save_to=path)
    size = request["input_size"]
    logits = session.run(np.zeros((request["batch"], 3, size, size), np.uint8))
    if not np.isfinite(logits).all():
        raise Refusal("the engine computes values that are not numbers", "use another --precision")
    engine = {
        "runtime": "onnxruntime",
        "file": name,
        "precision": request["precision"],
        "provider": session.provider,
        "settings": {"intra_op_num_threads": request["threads"], "inter_op_num_threads": 1},
        "fingerprint": fingerprint(),
    }
    with open(os.path.join(request["out"], ENGINE), "w", encoding="utf-8") as file:
        json.dump(engine, file, indent=1, sort_keys=True)
    return engine


def load(folder: str) -> Session:
    """Load the engine of a release.

    Raises:
        Refusal: It was built for another machine or runtime, or cannot be loaded.
    """
    with open(os.path.join(folder, ENGINE), encoding="utf-8") as file:
        engine = json.load(file)
    here = fingerprint()
    for key, built in engine["fingerprint"].items():
        if here.get(key) != built:
            raise Refusal(
                "the engine was built for {} {} and the device has {}".format(key, built, here.get(key)),
                "build it again for this device (--rerun build)",
            )
    threads = engine["settings"]["intra_op_num_threads"]
    return Session(os.path.join(folder, engine["file"]), threads, optimize=False)
