"""Runs a plan of TensorRT or TensorRT for RTX: buffers, a stream, and a CUDA graph for each batch size."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from . import builder, caches, cuda, layers, trt
from .protocol import OutOfMemory, Refusal


class Session:
    """A loaded plan with one image input and one output.

    Args:
        path: The plan.
        engine: What ``engine.json`` says.
        root: Where caches are.

    Attributes:
        provider: What really runs it.
        max_batch: Largest batch that it takes.
        settings: How it is run, for the record.
        layers: What :func:`toolkit.agent.layers.check` found, now or at the build.
        notes: What the user should know.
        threads: None: the GPU computes.
    """

    threads: int | None = None

    def __init__(self, path: str, engine: dict[str, Any], root: str) -> None:
        tensorrt = trt.module(engine["runtime"])
        self.notes: list[str] = []
        self.provider = engine["provider"]
        self._trt, self._description = tensorrt, engine
        self._log = trt.Log.of(tensorrt)
        self._cuda = cuda.start()
        self._turn = threading.Lock()  # the buffers are one for all calls
        with self._cuda:
            self._open(tensorrt, path, engine)
        self._kernels: Any = None
        self._kernels_file = os.path.join(root, "caches", engine["sha256"][:16] + ".runtime.cache")
        self._enqueues: dict[int, Callable[[], Any]] = {}
        self.settings: dict[str, Any] = {"cuda": self._cuda.name, "cuda_graph": None, "data_transfers": True}

    def _open(self, tensorrt: Any, path: str, engine: dict[str, Any]) -> None:
        """Load the plan, see that its layers are what was asked for, and make room for its input and output."""
        with open(path, "rb") as file:
            plan = file.read()
        runtime = tensorrt.Runtime(self._log.logger)
        if engine["settings"]["dla_core"] is not None:
            runtime.DLA_core = engine["settings"]["dla_core"]
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._failure("the engine does not load")
        self.layers = engine["layers"]
        if self.layers is None:
            try:
                information = builder.inspect(self._trt, self._engine, engine["input"], engine["batches"])
            except OutOfMemory as reason:
                raise self._failure(str(reason)) from reason
            self.layers = layers.check(engine["expected"], information)
        self._compiles = engine["runtime"] == "tensorrt-rtx"
        self._bind(tensorrt, engine)

    def _failure(self, what: str) -> Exception:
        try:
            self._log.raise_memory()
        except OutOfMemory as reason:
            return Refusal("{}: out of memory: {}".format(what, reason), "stop what else runs on the device")
        return Refusal("{}: {}".format(what, self._log.last()), "build it again for this device (--rerun build)")

    def _bind(self, tensorrt: Any, engine: dict[str, Any]) -> None:
        """Find the input and the output, and allocate their buffers for the largest batch."""
        plan = self._engine
        names = [plan.get_tensor_name(index) for index in range(plan.num_io_tensors)]
        inputs = [n for n in names if plan.get_tensor_mode(n) == tensorrt.TensorIOMode.INPUT]
        (self._input,), (self._output,) = inputs, [n for n in names if n not in inputs]
        self._dynamic = engine["batches"] is not None
        shape = tuple(plan.get_tensor_shape(self._input))
        self.max_batch = int(engine["batches"]["max"] if self._dynamic else shape[0])
        self._shape = shape[1:]
        self._out_shape = tuple(plan.get_tensor_shape(self._output))[1:]
        self._dtype = np.dtype(tensorrt.nptype(plan.get_tensor_dtype(self._output)))
        self._image_bytes = int(np.prod(self._shape))
        self._logit_bytes = int(np.prod(self._out_shape)) * self._dtype.itemsize
        self._host_in = self._cuda.pinned(self.max_batch * self._image_bytes)
        self._host_out = self._cuda.pinned(self.max_batch * self._logit_bytes)
        self._gpu_in = self._cuda.allocate(self._host_in.nbytes)
        self._gpu_out = self._cuda.allocate(self._host_out.nbytes)

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return logits ``(B, ...)`` of uint8 images ``(B, C, H, W)``, copies to and from the GPU included.

        Any thread may call it; calls wait for each other.
        """
        with self._turn, self._cuda:
            return self._ready(images)().copy()

    def prepare(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        """Return a query that runs the inference of images ``(B, C, H, W)``, copies to and from the GPU included.

        Its logits ``(B, ...)`` are overwritten by the next run. The images are copied into page-locked memory as
        part of the query, since in a program of the device's they come from elsewhere, too.
        """
        with self._turn, self._cuda:
            ready = self._ready(images)

        def query() -> np.ndarray:
            with self._turn, self._cuda:
                return ready()

        return query

    def _ready(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        batch, pixels = len(images), images.reshape(-1)
        if batch not in self._enqueues:
            self._enqueues[batch] = self._enqueue_of(batch)
        enqueues, synchronize = self._enqueues, self._cuda.synchronize  # no context of a query's own: see close
        source = self._host_in[: batch * self._image_bytes]
        raw = self._host_out[: batch * self._logit_bytes]
        logits: np.ndarray = raw.view(self._dtype).reshape(batch, *self._out_shape)

        def compute() -> np.ndarray:
            source[:] = pixels
            enqueues[batch]()
            synchronize()
            return logits

        return compute

    def _enqueue_of(self, batch: int) -> Callable[[], Any]:
        """Return a function that enqueues copies and inference of a batch, as a CUDA graph where that works.

        Each batch size has an execution context of its own: a captured graph is bound to its context's shapes.
        """
        context = self._context()
        if context is None:
            raise self._failure("no execution context for the engine")
        if self._dynamic:
            context.set_input_shape(self._input, (batch, *self._shape))
        context.set_tensor_address(self._input, self._gpu_in)
        context.set_tensor_address(self._output, self._gpu_out)
        source = self._host_in[: batch * self._image_bytes]
        destination = self._host_out[: batch * self._logit_bytes]

        def enqueue() -> None:
            self._cuda.to_gpu(self._gpu_in, source)
            if not context.execute_async_v3(self._cuda.stream):
                raise self._failure("the engine does not run")
            self._cuda.to_host(destination, self._gpu_out)

        enqueue()  # TensorRT sets itself up for a shape on its first run, which no graph may capture
        self._cuda.synchronize()
        graph = self._cuda.capture(enqueue)
        self.settings["cuda_graph"] = graph is not None
        return graph or enqueue

    def _context(self) -> Any:
        """Return a new execution context; TensorRT for RTX compiles kernels in it, and gets the known ones."""
        if not self._compiles:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        if self._kernels is None:
            self._kernels = config.create_runtime_cache()
            known = caches.read(self._kernels_file, self.notes)
            if known and not self._kernels.deserialize(known):
                self.notes.append("the runtime cache is of another version and is not used")
        config.set_runtime_cache(self._kernels)
        return self._engine.create_execution_context(config)

    def profile(self, queries: Iterable[np.ndarray]) -> tuple[list[dict[str, float]], dict[str, Any]]:
        """Return each query's microseconds by layer, and what the engine inspector says of the layers.

        In an execution context of its own and without a CUDA graph: TensorRT then waits for every layer.

        Args:
            queries: Images uint8 ``(1, C, H, W)``, run one after another.

        Raises:
            Refusal: Memory does not suffice for another execution context, or it does not run.
        """
        runs: list[dict[str, float]] = []
        description = self._description

        def report(layer: str, ms: float) -> None:
            runs[-1][layer] = runs[-1].get(layer, 0.0) + ms * 1000

        profiler = trt.profiler(self._trt, report)
        with self._turn, self._cuda:
            context = self._context()
            if context is None:
                raise self._failure("no execution context for the engine")
            if self._dynamic:
                context.set_input_shape(self._input, (1, *self._shape))
            context.set_tensor_address(self._input, self._gpu_in)
            context.set_tensor_address(self._output, self._gpu_out)
            context.profiler = profiler
            source = self._host_in[: self._image_bytes]
            for images in queries:
                runs.append({})
                source[:] = images.reshape(-1)
                self._cuda.to_gpu(self._gpu_in, source)
                if not context.execute_async_v3(self._cuda.stream):
                    raise self._failure("the engine does not run")
                self._cuda.synchronize()
            del context
            information = builder.inspect(self._trt, self._engine, description["input"], description["batches"])
        return runs, information

    def close(self) -> None:
        """Keep the kernels that TensorRT for RTX has compiled, for the next load, and give the memory back."""
        with self._cuda:
            kernels = None if self._kernels is None else bytes(memoryview(self._kernels.serialize()))
            self._enqueues.clear()  # contexts before their engine, all of it before its buffers
            del self._kernels, self._engine, self._host_in, self._host_out
            self._cuda.close()
        if kernels is not None:
            caches.write(self._kernels_file, kernels)
