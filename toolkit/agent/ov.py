"""OpenVINO on the CPU: the graph is shipped, checked at the build, and compiled where it runs.

No compiled blob is shipped: one holds a single shape, and two are twice the bytes. Nor does OpenVINO keep a cache
on the device, which would be content that nobody has signed.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from . import fingerprint, layers
from .protocol import Refusal, progress
from .releases import digest

MODEL = "model.openvino.onnx"
_ANY_BATCH = 1 << 16
_ELSE = {"fp32": "f32", "fp16": "f16", "int8": "f32"}  # what is computed in where no Q/DQ says int8
_PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}
_REMEDIES = {
    "INFERENCE_PRECISION_HINT": "ask for what this CPU computes in: --precision fp32 or int8",
    "INFERENCE_NUM_THREADS": "give it as many as this process may have: threads in the target file",
}


class Session:
    """A compiled graph with one image input and one output.

    The batch size that the engine is tuned for is compiled by itself; whatever else comes shares a graph for any
    batch, which is slower and compiled at its first use.

    Args:
        path: The model file.
        engine: What ``engine.json`` says.
        counters: Whether OpenVINO is to time each layer.

    Attributes:
        provider: What really runs it.
        max_batch: Largest batch that it takes.
        settings: How it is run, as the compiled graph says.
        layers: What :func:`toolkit.agent.layers.check` found of the compiled graph.
        notes: What the user should know.
        threads: That compute.

    Raises:
        Refusal: OpenVINO is not there or does not take the graph, or it would run otherwise than asked for.
    """

    def __init__(self, path: str, engine: dict[str, Any], counters: bool = False) -> None:
        try:
            import openvino
        except ImportError as error:
            raise Refusal(
                "OpenVINO cannot be imported by this Python: {}".format(error),
                "toolkit provision TARGET; on this machine python3 -m pip install openvino",
            ) from error
        self._openvino, self._core = openvino, openvino.Core()
        self._path, self._engine = path, engine
        # pinned, two programs of a device compute on the same core: a quarter slower, and alone no faster
        self._options = {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False, "PERF_COUNT": counters}
        self.provider = "OpenVINO CPU"
        self.settings: dict[str, Any] = {}
        self.layers: dict[str, Any] | None = None
        self.notes: list[str] = []
        self._turn = threading.Lock()  # a request is for one call at a time
        self._requests: dict[int | None, Any] = {}
        model = self._read()
        size = model.input().partial_shape[0]
        self.max_batch = _ANY_BATCH if size.is_dynamic else size.get_length()
        self._tuned: int | None = None
        if size.is_dynamic and engine["batches"] is not None:
            self._tuned = engine["batches"]["opt"]
            model.reshape([self._tuned, *engine["input"]["shape"]])
        self._compiled = {self._tuned: self._compile(model)}
        self.threads: int = self.settings["INFERENCE_NUM_THREADS"]
        self._logits: np.ndarray | None = None

    def _read(self) -> Any:
        try:
            return self._core.read_model(self._path)
        except RuntimeError as error:
            raise Refusal(
                "OpenVINO does not take the graph: {}".format(_last_line(error)),
                "replace what it names in the model, or use --runtime onnxruntime",
            ) from error

    def _compile(self, model: Any) -> Any:
        asked = self._engine["settings"]
        try:
            compiled = self._core.compile_model(model, "CPU", dict(asked, **self._options))
        except RuntimeError as error:
            raise Refusal(
                "OpenVINO does not compile the graph: {}".format(_last_line(error)), "use --runtime onnxruntime"
            ) from error
        self.settings = {name: _plain(compiled.get_property(name)) for name in asked}
        for name, value in asked.items():
            if self.settings[name] != value:
                raise Refusal(
                    "asked OpenVINO for {} {} and got {}".format(name, value, self.settings[name]),
                    _REMEDIES.get(name, "use --runtime onnxruntime"),
                )
        self.layers = layers.check(self._engine["expected"], {"Layers": _described(compiled)})
        return compiled

    def compiled(self, batch: int) -> Any:
        """Return OpenVINO's compiled model for a batch size."""
        key = self._key(batch)
        if key not in self._compiled:
            self._compiled[key] = self._compile(self._read())
        return self._compiled[key]

    def _key(self, batch: int) -> int | None:
        return batch if batch == self._tuned else None

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return logits ``(B, ...)`` float32 of uint8 images ``(B, 3, S, S)``.

        Any thread may call it; calls wait for each other.
        """
        with self._turn:
            key = self._key(len(images))
            if key not in self._requests:
                self._requests[key] = self.compiled(len(images)).create_infer_request()
            logits: np.ndarray = self._requests[key].infer(images, share_inputs=True)[0]
            return logits

    def prepare(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        """Return a query that runs the inference of uint8 images ``(B, 3, S, S)`` alone, in a request of its own.

        Its logits ``(B, ...)`` are overwritten by its next run; the images are copied now, once.
        """
        if self._logits is None:
            self._logits = np.array(self.run(images))
        logits = np.empty((len(images), *self._logits.shape[1:]), self._logits.dtype)
        with self._turn:
            request = self.compiled(len(images)).create_infer_request()
        request.set_input_tensor(self._openvino.Tensor(images))
        request.set_output_tensor(self._openvino.Tensor(logits, shared_memory=True))
        # the binding itself: what Python puts around it costs as much again as the whole call does
        infer = functools.partial(
            self._openvino._pyopenvino.InferRequest.infer, request, {}, share_outputs=True, decode_strings=False
        )

        def query() -> np.ndarray:
            infer()
            return logits

        return query

    def close(self) -> None:
        """Do nothing: OpenVINO keeps nothing for the next load."""


def _last_line(error: Exception) -> str:
    """Return the line of OpenVINO's exception that says what is wrong; those before say where in its sources."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _plain(value: Any) -> Any:
    """Return a property as JSON has it: a type by its name."""
    return value.to_string() if hasattr(value, "to_string") else value


def _information(operation: Any) -> dict[str, str]:
    return {key: str(value.value) for key, value in operation.get_rt_info().items()}


def _originals(information: dict[str, str]) -> list[str]:
    """Return the ONNX nodes that a layer computes; OpenVINO marks the parts that it splits one into."""
    names = (name.partition("/WithoutBiases")[0] for name in information["originalLayersNames"].split(","))
    return [name for name in dict.fromkeys(names) if name]


def _described(compiled: Any) -> list[dict[str, Any]]:
    """Return the layers of the execution graph that compute products, as ``layers.check`` reads them."""
    described = []
    for operation in compiled.get_runtime_model().get_ops():
        information = _information(operation)
        if information["layerType"] in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
            precision = _PRECISIONS.get(information["runtimePrecision"], information["runtimePrecision"])
            described.append({"Name": " ".join(_originals(information)), "Inputs": [{"Datatype": precision}]})
    return described


def profile(path: str, engine: dict[str, Any], queries: list[np.ndarray]) -> list[dict[str, Any]]:
    """Time each layer of an engine.

    OpenVINO's counters are whole microseconds of the mean since the graph was compiled. The first query, which sets
    things up, is taken out again; what takes less than a microsecond is not told.

    Args:
        path: The model file.
        engine: What ``engine.json`` says.
        queries: Two or more batches of one size, uint8 ``(B, 3, S, S)``, each computed once.

    Returns:
        In the order in which they run: ``name``, ``type``, ``us`` (mean microseconds a query), ``nodes`` (names of
        the ONNX nodes that it stands for, and some that are OpenVINO's own; may be empty).
    """
    session = Session(path, engine, counters=True)
    compiled = session.compiled(len(queries[0]))
    request = compiled.create_infer_request()

    def means() -> dict[str, float]:
        return {told.node_name: told.real_time.total_seconds() * 1e6 for told in request.profiling_info}

    request.infer(queries[0], share_inputs=True)
    first = means()
    for query in queries[1:]:
        request.infer(query, share_inputs=True)
    count, found = len(queries), []
    mean = means()
    for operation in compiled.get_runtime_model().get_ordered_ops():
        name, information = operation.get_friendly_name(), _information(operation)
        if mean.get(name):
            spent = (mean[name] * count - first[name]) / (count - 1)
            kind, nodes = information["layerType"], _originals(information)
            found.append({"name": name, "type": kind, "us": max(spent, 0.0), "nodes": nodes})
    return found


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Compile an ONNX file for this machine, to see that it runs here as it was asked for.

    Args:
        request: ``onnx`` (path), ``out`` (folder), ``threads``, ``precision``, ``input`` (``shape``), ``batches``,
            ``expected`` (node to precision).

    Returns:
        What ``engine.json`` says; see ``builder.build``.

    Raises:
        Refusal: See :class:`Session`; or it computes what is no number.
    """
    progress(0, 1, "compiling the graph")
    path = os.path.join(request["out"], MODEL)
    shutil.copyfile(request["onnx"], path)
    engine = {
        "runtime": "openvino",
        "file": MODEL,
        "precision": request["precision"],
        "settings": {
            # left to itself it computes fp32 in bf16 where the CPU can
            "INFERENCE_PRECISION_HINT": _ELSE[request["precision"]],
            "INFERENCE_NUM_THREADS": request["threads"],
            "NUM_STREAMS": 1,
        },
        "input": request["input"],
        "batches": request["batches"],
        "expected": request["expected"],
        "fingerprint": fingerprint.of_cpu("openvino"),
        "sha256": digest(path),
        "notes": [],
    }
    session = Session(path, engine)
    logits = session.run(np.zeros((min(2, session.max_batch), *request["input"]["shape"]), np.uint8))
    if not np.isfinite(logits).all():
        raise Refusal("the engine computes values that are not numbers", "use another --precision")
    return dict(engine, provider=session.provider, layers=session.layers)
