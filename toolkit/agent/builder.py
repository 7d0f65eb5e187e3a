"""One builder for TensorRT and TensorRT for RTX: on the host, in a container, on the device."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from typing import Any, Callable, Dict, Optional

from . import caches, facts, fingerprint, layers, trt, trtexec
from .protocol import OutOfMemory, Refusal, progress

PLAN = "model.engine"
LAYERS = "layers.json"
_LEAST_WORKSPACE = 32 << 20
_SMALL_DEVICE = 10 << 30  # a Jetson with 8 GB, shared between CPU and GPU
_SMALL_WORKSPACE, _WORKSPACE = 512 << 20, 4 << 30

Attempt = Callable[[int], Optional[Dict[str, Any]]]  # subscripted when Python 3.8 runs it


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build a plan from an ONNX file.

    Args:
        request: ``runtime``, ``root`` (where caches are), ``onnx`` (path), ``out`` (folder), ``precision``,
            ``input`` (``name``, ``shape`` without the batch), ``batches`` (``min``, ``opt``, ``max``; None for a
            graph of fixed batch), ``expected`` (node to precision), ``options``: ``workspace_bytes``,
            ``optimization_level``, ``dla_core``, ``hardware_compatibility``, ``compute_capabilities``
            (TensorRT for RTX: whom to build for).

    Returns:
        What ``engine.json`` says: ``runtime``, ``file``, ``precision``, ``provider``, ``settings``,
        ``fingerprint``, ``sha256``, ``layers`` (see :func:`layers.check`), ``notes``.

    Raises:
        Refusal: The graph cannot be identity, memory does not suffice, or the engine is not what was asked for.
    """
    here = facts.collect(request)
    if not here["runtimes"].get(request["runtime"]):
        trt.module(request["runtime"])  # refuses with the reason
    notes: list[str] = []
    path = os.path.join(request["out"], PLAN)
    cache = os.path.join(request["root"], "caches", caches.key(request["runtime"], here) + ".timing.cache")
    if request["runtime"] == "tensorrt" and not here["tensorrt_python"]:
        route, attempt = "trtexec", _with_trtexec(request, here, path, cache, notes)
    else:
        route, attempt = "Python", _with_bindings(request, path, cache, notes)
    information, workspace = _with_less_and_less(attempt, _workspace(request, here), notes)
    with open(path, "rb") as file:
        plan = file.read()
    identity = fingerprint.of(request, here)
    told = trt.plan_version(plan)
    if told is not None and fingerprint.same(told, identity["version"] or told):
        identity["version"] = told
    checked = None
    if information is not None:
        with open(os.path.join(request["out"], LAYERS), "w", encoding="utf-8") as file:
            json.dump(information, file, indent=1)
        checked = layers.check(request["expected"], information)
    return {
        "runtime": request["runtime"],
        "file": PLAN,
        "precision": request["precision"],
        "provider": "{} {}".format(trt.name(request["runtime"]), identity["version"]),
        "settings": {
            "built_with": route,
            "workspace_bytes": workspace,
            "dla_core": request["options"].get("dla_core"),
        },
        "input": request["input"],
        "batches": request["batches"],
        "fingerprint": identity,
        "sha256": hashlib.sha256(plan).hexdigest(),
        "layers": checked,
        "expected": request["expected"],
        "notes": list(dict.fromkeys(notes)),  # a second attempt finds the same again
    }


def _workspace(request: dict[str, Any], here: dict[str, Any]) -> int:
    """Return how much scratch memory tactics may take: the one asked for, or one that suits the device."""
    asked = request["options"].get("workspace_bytes")
    if asked:
        return int(asked)
    return _SMALL_WORKSPACE if here["l4t"] and here["memory_bytes"] < _SMALL_DEVICE else _WORKSPACE


def _with_less_and_less(attempt: Attempt, workspace: int, notes: list[str]) -> tuple[dict[str, Any] | None, int]:
    """Build, with a smaller workspace each time that the builder runs out of memory."""
    while True:
        try:
            return attempt(workspace), workspace
        except OutOfMemory as reason:
            if workspace <= _LEAST_WORKSPACE:
                raise Refusal(
                    "the builder ran out of memory even with a workspace of {} MiB: {}".format(
                        workspace >> 20, reason
                    ),
                    "stop what else runs on the device (its desktop, say), add swap, or use a smaller network",
                ) from reason
            smaller = max(workspace // 4, _LEAST_WORKSPACE)
            notes.append(
                "the builder ran out of memory with a workspace of {} MiB ({}); tried again with {} MiB".format(
                    workspace >> 20, reason, smaller >> 20
                )
            )
            progress(0, 0, "out of memory; again with a workspace of {} MiB".format(smaller >> 20))
            workspace = smaller


def _with_trtexec(request: dict[str, Any], here: dict[str, Any], out: str, cache: str, notes: list[str]) -> Attempt:
    def attempt(workspace: int) -> dict[str, Any]:
        scratch = out + ".timing.cache"
        known = caches.read(cache, notes)
        if known:
            with open(scratch, "wb") as file:
                file.write(known)
        try:
            built = trtexec.build(here["trtexec"], request, workspace=workspace, cache=scratch, out=out)
            with contextlib.suppress(FileNotFoundError), open(scratch, "rb") as file:
                caches.write(cache, file.read())
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(scratch)
        return dict(built["layers"])

    return attempt


def _with_bindings(request: dict[str, Any], out: str, cache: str, notes: list[str]) -> Attempt:
    trt_module = trt.module(request["runtime"])

    def attempt(workspace: int) -> dict[str, Any] | None:
        return _build_once(trt_module, request, workspace, out, cache, notes)

    return attempt


def _build_once(
    tensorrt: Any, request: dict[str, Any], workspace: int, out: str, cache: str, notes: list[str]
) -> dict[str, Any] | None:
    """Build a plan through the Python API; returns the layer information where the engine can be loaded here."""
    log = trt.Log.of(tensorrt)
    try:
        builder = tensorrt.Builder(log.logger)
    except TypeError as error:  # the bindings' way to say that there is none
        log.raise_memory()
        raise Refusal(
            "the builder cannot start: {}".format(log.last()),
            "check the driver with nvidia-smi; in a container ask for the GPU",
        ) from error
    typed = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    # TensorRT 8 has no strong typing and needs explicit batch; from 10 on a strongly typed network has it
    flag = tensorrt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH if typed is None else typed
    network = builder.create_network(1 << int(flag))
    _parse(tensorrt, network, request["onnx"], log)
    config = builder.create_builder_config()
    _configure(tensorrt, builder, network, config, request, workspace, typed is not None)
    timing = _load_timing(tensorrt, config, request, cache, notes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        log.raise_memory()
        raise Refusal(
            "{} cannot build the engine: {}".format(trt.name(request["runtime"]), log.last()),
            "use another --precision, or replace that operator in the model",
        )
    content = bytes(memoryview(plan))
    with open(out, "wb") as file:
        file.write(content)
    if timing is not None:
        caches.write(cache, bytes(memoryview(config.get_timing_cache().serialize())))
    if request["options"].get("compute_capabilities"):
        return None  # there is no such GPU here: the device reads the layers when it loads the engine
    engine = tensorrt.Runtime(log.logger).deserialize_cuda_engine(content)
    if engine is None:
        log.raise_memory()
        raise Refusal("the engine that was just built does not load: {}".format(log.last()), "run it again with -v")
    return inspect(tensorrt, engine, request["input"], request["batches"])


def _parse(tensorrt: Any, network: Any, onnx: str, log: trt.Log) -> None:
    parser = tensorrt.OnnxParser(network, log.logger)
    if parser.parse_from_file(onnx):
        return
    problem = log.last()
    if parser.num_errors:
        error = parser.get_error(0)
        problem = error.desc().splitlines()[0]
        if hasattr(error, "node_operator"):
            node, operator = error.node_name(), error.node_operator()
        else:
            node, operator = log.node()
        if operator:
            problem = "{} ({}): {}".format(node or "a node without a name", operator, problem)
    raise Refusal(
        "the graph cannot be parsed: {}".format(problem),
        "replace that operator in the model, or use --runtime onnxruntime",
    )


def _configure(
    tensorrt: Any, builder: Any, network: Any, config: Any, request: dict[str, Any], workspace: int, typed: bool
) -> None:
    options, flags = request["options"], tensorrt.BuilderFlag
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, workspace)
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
    if options.get("optimization_level") is not None:
        _need(config, "builder_optimization_level", "an optimisation level")
        config.builder_optimization_level = options["optimization_level"]
    if not typed:  # TensorRT 8: types stand in the graph, and the builder has to be allowed to use them
        if request["precision"] == "fp16" or "fp16" in request["expected"].values():
            config.set_flag(flags.FP16)
        if request["precision"] == "int8":
            config.set_flag(flags.INT8)
    if request["precision"] == "fp32":
        config.clear_flag(flags.TF32)  # ten bits of mantissa are not what was asked for
    compatibility = options.get("hardware_compatibility") or "none"
    if compatibility != "none":
        level = compatibility.upper().replace("+", "_PLUS").replace("-", "_")
        levels = getattr(tensorrt, "HardwareCompatibilityLevel", None)
        if not hasattr(levels, level):
            raise Refusal(
                "TensorRT {} has no hardware compatibility '{}'".format(tensorrt.__version__, compatibility),
                "leave build.hardware_compatibility out of the target",
            )
        config.hardware_compatibility_level = getattr(levels, level)
    core = options.get("dla_core")
    if core is not None:
        if builder.num_DLA_cores <= core:
            raise Refusal(
                "the target asks for DLA core {} and this device offers {} to TensorRT {}".format(
                    core, builder.num_DLA_cores, tensorrt.__version__
                ),
                "leave build.dla_core out of the target",
            )
        batches = request["batches"]
        if batches is not None and batches["min"] != batches["max"]:
            raise Refusal(  # TensorRT would leave all of it to the GPU, and not say so
                "a DLA runs one batch size only, and the engine is to take {} to {}".format(
                    batches["min"], batches["max"]
                ),
                "set benchmark.batches in the profile to [1]",
            )
        config.default_device_type = tensorrt.DeviceType.DLA
        config.DLA_core = core
        config.set_flag(flags.GPU_FALLBACK)
    capabilities = options.get("compute_capabilities")
    if capabilities:
        known = tensorrt.ComputeCapability.__members__
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            member = known.get(capability.upper().replace("_", ""))
            if member is None:
                names = ", ".join(name.replace("SM", "sm_") for name in known if name.startswith("SM"))
                raise Refusal("TensorRT for RTX does not build for {}".format(capability), "it knows " + names)
            config.set_compute_capability(member, index)
    if request["batches"] is not None:
        shape, batches = request["input"]["shape"], request["batches"]
        profile = builder.create_optimization_profile()
        profile.set_shape(request["input"]["name"], *[(batches[key], *shape) for key in ("min", "opt", "max")])
        config.add_optimization_profile(profile)
    _refuse_open_shapes(network, request)
    if hasattr(tensorrt, "IProgressMonitor"):
        config.progress_monitor = _monitor(tensorrt)


def _need(owner: Any, attribute: str, what: str) -> None:
    if not hasattr(owner, attribute):
        raise Refusal("this TensorRT has no {}".format(what), "leave that option out of the target")


def _refuse_open_shapes(network: Any, request: dict[str, Any]) -> None:
    """Refuse a dynamic dimension that no profile covers: TensorRT would fail on it late and vaguely."""
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        covered = request["batches"] is not None and tensor.name == request["input"]["name"]
        if any(size < 0 for size in list(tensor.shape)[1 if covered else 0 :]):
            shape = "x".join("?" if size < 0 else str(size) for size in tensor.shape)
            raise Refusal(
                "the graph's input '{}' is of dynamic shape ({}), and no optimisation profile covers it".format(
                    tensor.name, shape
                ),
                "export the model with fixed sizes; only the batch of '{}' may vary".format(
                    request["input"]["name"]
                ),
            )


def _monitor(tensorrt: Any) -> Any:
    class Monitor(tensorrt.IProgressMonitor):  # type: ignore[misc]
        """Hands TensorRT's outermost phase on as progress."""

        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)
            self._phases: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._phases[phase_name] = num_steps
            progress(0, self._phases.get(phase_name, 0), phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                progress(step + 1, self._phases[phase_name], phase_name)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

    return Monitor()


def _load_timing(tensorrt: Any, config: Any, request: dict[str, Any], cache: str, notes: list[str]) -> Any:
    """Set the timing cache; none for TensorRT for RTX, whose calls would ask for a GPU."""
    if request["runtime"] != "tensorrt":
        return None
    timing = config.create_timing_cache(caches.read(cache, notes))
    if timing is None or not config.set_timing_cache(timing, ignore_mismatch=False):
        notes.append("TensorRT did not take the timing cache; it starts with an empty one")
        timing = config.create_timing_cache(b"")
        config.set_timing_cache(timing, ignore_mismatch=False)
    return timing


def inspect(tensorrt: Any, engine: Any, image: dict[str, Any], batches: dict[str, int] | None) -> dict[str, Any]:
    """Return the engine inspector's JSON about a loaded engine; formats of dynamic shapes need a context."""
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    if context is None:
        raise OutOfMemory("no execution context for the engine")
    if batches is not None:
        context.set_input_shape(image["name"], (batches["opt"], *image["shape"]))
    inspector.execution_context = context
    return dict(json.loads(inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON)))
