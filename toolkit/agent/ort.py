"""ONNX Runtime on the CPU: the graph is optimised for the machine it will run on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from . import fingerprint
from .protocol import Refusal, progress
from .releases import digest

MODEL = "model.optimized.onnx"
_ANY_BATCH = 1 << 16


class Session:
    """A loaded engine.

    Args:
        path: The model file.
        threads: Threads within one operator.
        optimize: Whether ONNX Runtime optimises the graph (at build), or takes it as it is (at load).
        save_to: Where to keep the optimised graph.

    Attributes:
        provider: What really runs it.
        max_batch: Largest batch that it takes.
        settings: How it is run, for the record.
        threads: That compute.
    """

    def __init__(self, path: str, threads: int, optimize: bool, save_to: str | None = None) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise Refusal(
                "ONNX Runtime cannot be imported on the device: {}".format(error),
                "toolkit provision TARGET",
            ) from error
        self.settings: dict[str, Any] = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        self.threads = threads
        self.layers = None
        self.notes: list[str] = []
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
        image = self._session.get_inputs()[0]
        self.max_batch = image.shape[0] if isinstance(image.shape[0], int) else _ANY_BATCH
        self._input = image.name
        self._output = [self._session.get_outputs()[0].name]
        self._logits: np.ndarray | None = None

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return logits ``(B, ...)`` float32 of uint8 images ``(B, 3, S, S)``."""
        logits: np.ndarray = self._session.run(self._output, {self._input: images})[0]
        return logits

    def prepare(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        """Return a query that runs the inference of images ``(B, 3, S, S)`` alone, into memory that is there.

        Its logits ``(B, ...)`` are overwritten by its next run; the images are not copied.
        """
        if self._logits is None:
            self._logits = self.run(images)
        logits = np.empty((len(images), *self._logits.shape[1:]), self._logits.dtype)
        binding = self._session.io_binding()
        binding.bind_cpu_input(self._input, images)
        binding.bind_output(self._output[0], "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        run = self._session.run_with_iobinding

        def query() -> np.ndarray:
            run(binding)
            return logits

        return query

    def close(self) -> None:
        """Do nothing: ONNX Runtime keeps nothing for the next load."""


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Optimise an ONNX file for this machine.

    Args:
        request: ``onnx`` (path), ``out`` (folder), ``threads``, ``precision``, ``input`` (``shape``), ``batches``.

    Returns:
        What ``engine.json`` says; see ``builder.build``.
    """
    progress(0, 1, "optimising the graph")
    path = os.path.join(request["out"], MODEL)
    session = Session(request["onnx"], request["threads"], optimize=True, save_to=path)
    logits = session.run(np.zeros((min(2, session.max_batch), *request["input"]["shape"]), np.uint8))
    if not np.isfinite(logits).all():
        raise Refusal("the engine computes values that are not numbers", "use another --precision")
    return {
        "runtime": "onnxruntime",
        "file": MODEL,
        "precision": request["precision"],
        "provider": session.provider,
        "settings": session.settings,
        "input": request["input"],
        "batches": request["batches"],
        "fingerprint": fingerprint.of_cpu("onnxruntime"),
        "sha256": digest(path),
        "notes": [],
    }
