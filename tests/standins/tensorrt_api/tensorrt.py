"""Stands in for TensorRT's Python API: 8.5, 8.6, 10.3, 10.16 or 11.0, with the names which that version has.

Names, refusals and their wording follow ``python/src/infer/pyCore.cpp``, ``python/src/parsers/pyOnnx.cpp`` and the
ONNX parser at the versions' tags. A plan is a header like the real one's, then the graph, which ONNX Runtime runs.

Environment:
    TENSORRT_STANDIN: the version.
    TENSORRT_STANDIN_GPU: name and compute capability; empty for none.
    TENSORRT_STANDIN_MEMORY: bytes of workspace that there are; more cannot be had.
    TENSORRT_STANDIN_FP32: a node that runs in FP32 whatever it was asked for.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import struct
from typing import Any

import numpy as np
import onnx
import standin_gpu as gpu

_RELEASES = {
    "8.5": "8.5.2.2",
    "8.6": "8.6.2.3",
    "10.3": "10.3.0.30",
    "10.16": "10.16.1.11",
    "11.0": "11.0.0.114",
}
_RELEASE = os.environ.get("TENSORRT_STANDIN", "10.3")
_V = tuple(int(part) for part in _RELEASE.split("."))
__version__ = _RELEASES[_RELEASE]
_GPU, _, _CAPABILITY = os.environ.get("TENSORRT_STANDIN_GPU", "NVIDIA A100-SXM4-40GB, sm_80").partition(", ")
_SM = int(_CAPABILITY[3:] or 0)
_MEMORY = int(os.environ.get("TENSORRT_STANDIN_MEMORY", "0"))
_FP32 = os.environ.get("TENSORRT_STANDIN_FP32")

_layers_timed = 0  # by the last build; those that the timing cache knew are not timed again


class _Enum(enum.Enum):
    """An enumeration of pybind11: a number only where asked for one."""

    def __int__(self) -> int:
        return int(self.value)


def _enum(name: str, members: str) -> Any:
    return _Enum(name, members.split(), start=0)


_FLAGS_8_5 = (
    "FP16 INT8 DEBUG GPU_FALLBACK STRICT_TYPES REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE "
    "OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS DIRECT_IO REJECT_EMPTY_ALGORITHMS "
    "ENABLE_TACTIC_HEURISTIC"
)
_FLAGS_11_0 = (
    "DEBUG GPU_FALLBACK REFIT DISABLE_TIMING_CACHE EDITABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE "
    "DIRECT_IO VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME ERROR_ON_TIMING_CACHE_MISS DISABLE_COMPILATION_CACHE "
    "STRIP_PLAN REFIT_IDENTICAL WEIGHT_STREAMING REFIT_INDIVIDUAL STRICT_NANS MONITOR_MEMORY "
    "DISTRIBUTIVE_INDEPENDENCE"
)
_FLAGS_10_3 = (
    "FP16 BF16 INT8 DEBUG GPU_FALLBACK REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE "
    "OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS DIRECT_IO REJECT_EMPTY_ALGORITHMS VERSION_COMPATIBLE "
    "EXCLUDE_LEAN_RUNTIME FP8 ERROR_ON_TIMING_CACHE_MISS DISABLE_COMPILATION_CACHE WEIGHTLESS STRIP_PLAN "
    "REFIT_IDENTICAL WEIGHT_STREAMING INT4 REFIT_INDIVIDUAL"
)
_FLAGS = {
    "8.5": _FLAGS_8_5,
    "8.6": _FLAGS_8_5 + " VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME FP8",
    "10.3": _FLAGS_10_3,
    "10.16": _FLAGS_10_3 + " STRICT_NANS MONITOR_MEMORY FP4 EDITABLE_TIMING_CACHE DISTRIBUTIVE_INDEPENDENCE",
    "11.0": _FLAGS_11_0,
}
_CREATION = {
    "8.5": "EXPLICIT_BATCH EXPLICIT_PRECISION",
    "8.6": "EXPLICIT_BATCH EXPLICIT_PRECISION",
    "10.3": "EXPLICIT_BATCH STRONGLY_TYPED",
    "10.16": "EXPLICIT_BATCH STRONGLY_TYPED PREFER_AOT_PYTHON_PLUGINS PREFER_JIT_PYTHON_PLUGINS",
    "11.0": "STRONGLY_TYPED PREFER_AOT_PYTHON_PLUGINS PREFER_JIT_PYTHON_PLUGINS",
}
BuilderFlag = _enum("BuilderFlag", _FLAGS[_RELEASE])
NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", _CREATION[_RELEASE])
MemoryPoolType = _enum("MemoryPoolType", "WORKSPACE DLA_MANAGED_SRAM DLA_LOCAL_DRAM DLA_GLOBAL_DRAM")
ProfilingVerbosity = _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY NONE DETAILED")
LayerInformationFormat = _enum("LayerInformationFormat", "ONELINE JSON")
DeviceType = _enum("DeviceType", "GPU DLA")
TensorIOMode = _enum("TensorIOMode", "NONE INPUT OUTPUT")
DataType = _enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8" + (" FP8" if _V >= (8, 6) else ""))
if _V >= (8, 6):
    HardwareCompatibilityLevel = _enum(
        "HardwareCompatibilityLevel", "NONE AMPERE_PLUS" + (" SAME_COMPUTE_CAPABILITY" if _V >= (10, 9) else "")
    )

_TYPES = {
    onnx.TensorProto.FLOAT: DataType.FLOAT,
    onnx.TensorProto.FLOAT16: DataType.HALF,
    onnx.TensorProto.UINT8: DataType.UINT8,
    onnx.TensorProto.INT8: DataType.INT8,
    onnx.TensorProto.INT32: DataType.INT32,
}


class ILogger:
    Severity = _enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


def _error(logger: ILogger, code: int, kind: str, text: str) -> None:
    where = "[standin.cpp::standin::1]" if _V < (10,) else "IBuilder::buildSerializedNetwork:"
    logger.log(ILogger.Severity.ERROR, f"{code}: {where} Error Code {code}: {kind} ({text})")


class IHostMemory(bytes):
    """What TensorRT hands out: a buffer."""


if _V >= (10,):

    class IProgressMonitor:
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

        def step_complete(self, phase_name: str, step: int) -> bool: ...

        def phase_finish(self, phase_name: str) -> None: ...


class ITensor:
    __slots__ = ("dtype", "name", "shape")

    def __init__(self, value: onnx.ValueInfoProto) -> None:
        tensor = value.type.tensor_type
        self.name = value.name
        self.dtype = _TYPES[tensor.elem_type]
        self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)


class INetworkDefinition:
    __slots__ = ("_explicit", "_inputs", "_model", "_outputs", "_typed")

    def __init__(self, flags: int) -> None:
        def asked(name: str) -> bool:
            member = getattr(NetworkDefinitionCreationFlag, name, None)
            return member is not None and bool(flags >> int(member) & 1)

        self._explicit = _V >= (10,) or asked("EXPLICIT_BATCH")
        self._typed = _V >= (11,) or asked("STRONGLY_TYPED")

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]


class ParserError:
    def __init__(self, description: str, index: int = -1, node: onnx.NodeProto | None = None) -> None:
        self._description, self._index, self._node = description, index, node or onnx.NodeProto()

    def desc(self) -> str:
        return self._description

    def node(self) -> int:
        return self._index

    if _V >= (10,):

        def node_name(self) -> str:
            return self._node.name

        def node_operator(self) -> str:
            return self._node.op_type


# of the standard's operators, those that the parser does not import (its docs/operators.md, in short)
_UNKNOWN = {"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "MaxUnpool", "QLinearConv", "StringNormalizer"}
_NO_PLUGIN = 'creator && "Plugin not found, are the plugin name, version, and namespace correct?"'


def _complaint(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> str | None:
    """Return why the parser does not take a node."""
    if node.domain not in ("", "ai.onnx") or node.op_type in _UNKNOWN or not onnx.defs.has(node.op_type):
        return _NO_PLUGIN
    quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear")
    if quantizes and _V < (10,) and len(node.input) != 3:
        return "This version of TensorRT requires 3 inputs for the DequantizeLinear operator."
    if quantizes and len(node.input) == 3:
        zero = constants[node.input[2]]
        if onnx.numpy_helper.to_array(zero).any():
            return "shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported"
        if zero.data_type == onnx.TensorProto.UINT8:
            return "TensorRT supports QuantizeLinear/DequantizeLinear with UINT8 zero_point only on DLA"
    return None


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._logger = network, logger
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        network = self._network
        if not network._explicit:
            self._errors.append(ParserError("This version of the ONNX parser only supports explicit batch"))
            return False
        try:
            parsed = onnx.load(model)
            network._model = onnx.shape_inference.infer_shapes(parsed)
        except Exception:
            self._errors.append(ParserError("Failed to parse the ONNX model."))
            return False
        graph = network._model.graph
        constants = {tensor.name: tensor for tensor in graph.initializer}
        for index, node in enumerate(graph.node):
            complaint = _complaint(node, constants)
            if complaint is not None:
                self._errors.append(ParserError("Assertion failed: " + complaint, index, node))
                for line in (
                    f'While parsing node number {index} [{node.op_type} -> "{node.output[0]}"]:',
                    "--- Begin node ---",
                    str(node),
                    "--- End node ---",
                    f"ERROR: standin.cpp:1 In function importer:\n[8] Assertion failed: {complaint}",
                ):
                    self._logger.log(ILogger.Severity.ERROR, f"ModelImporter.cpp:1: {line}")
                return False
        network._inputs = [ITensor(value) for value in graph.input if value.name not in constants]
        network._outputs = [ITensor(value) for value in graph.output]
        return True


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        if not all(low <= best <= high for low, best, high in zip(min, opt, max, strict=True)):
            raise ValueError("Shape provided for min/opt/max is inconsistent")
        self._shapes[input] = (min, opt, max)


class ITimingCache:
    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(b"timing" + json.dumps(self._content).encode())


class IBuilderConfig:
    __slots__ = (
        "DLA_core",
        "_cache",
        "_flags",
        "_logger",
        "_profiles",
        "_workspace",
        "default_device_type",
        "profiling_verbosity",
        *(("builder_optimization_level", "hardware_compatibility_level") if _V >= (8, 6) else ()),
        *(("progress_monitor",) if _V >= (10,) else ()),
    )

    def __init__(self, logger: ILogger) -> None:
        self._logger, self._cache, self._profiles = logger, None, []
        self._flags = {BuilderFlag.TF32}
        self._workspace = 1 << 62
        self.default_device_type, self.DLA_core = DeviceType.GPU, -1
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        if _V >= (8, 6):
            self.builder_optimization_level = 3
            self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        if _V >= (10,):
            self.progress_monitor = None

    def set_flag(self, flag: Any) -> None:
        self._flags.add(BuilderFlag(flag))

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(BuilderFlag(flag))

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        if MemoryPoolType(pool) is MemoryPoolType.WORKSPACE:
            self._workspace = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        blob = bytes(memoryview(serialized_timing_cache))
        if not blob:
            return ITimingCache({"version": __version__, "gpu": _GPU, "timed": []})
        try:
            return ITimingCache(json.loads(blob.removeprefix(b"timing")))
        except ValueError:
            _error(self._logger, 1, "Serialization", "the timing cache cannot be deserialized")
            return None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if not isinstance(cache, ITimingCache):
            raise TypeError("set_timing_cache(): incompatible function arguments")
        here = {"version": __version__, "gpu": _GPU}
        if not ignore_mismatch and {key: cache._content[key] for key in here} != here:
            _error(self._logger, 4, "Internal Error", "the timing cache belongs to another device")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        if not isinstance(logger, ILogger):
            raise TypeError("__init__(): incompatible constructor arguments")
        if not _GPU:
            logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    @property
    def num_DLA_cores(self) -> int:
        return 2 if _SM == 87 and _V <= (10, 7) else 0

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._logger)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        layers = _layers(network, config)
        problem = _problem(network, config, layers)
        if problem is not None:
            _error(self._logger, *problem)
            return None
        if _MEMORY and config._workspace > _MEMORY:
            sizes = f"{config._workspace >> 20}MB Available: {_MEMORY >> 20}MB"
            for line in (
                f"Tactic Device request: {sizes}. Device memory is insufficient to use tactic.",
                f"Skipping tactic 1 due to insufficient memory on requested size of {config._workspace} detected",
            ):
                self._logger.log(ILogger.Severity.WARNING, line)
            first = layers[0]["Name"]
            _error(self._logger, 10, "Internal Error", f"Could not find any implementation for node {first}.")
            return None
        if not _time(config, layers):
            return None
        level = config.hardware_compatibility_level.name if _V >= (8, 6) else "NONE"
        shapes = config._profiles[0]._shapes if config._profiles else {}
        about = {
            "version": __version__,
            "gpu": _GPU,
            "sm": _SM,
            "compatible": level,
            "shapes": shapes,
            "layers": layers,
            "flags": sorted(flag.name for flag in config._flags),
            "workspace": config._workspace,
            "detailed": config.profiling_verbosity is ProfilingVerbosity.DETAILED,
        }
        return IHostMemory(_plan(json.dumps(about).encode(), network._model.SerializeToString()))


def _problem(
    network: INetworkDefinition, config: IBuilderConfig, layers: list[dict[str, Any]]
) -> tuple[int, str, str] | None:
    """Return what the builder refuses a network with: code, kind, text."""
    profiled = config._profiles[0]._shapes if config._profiles else {}
    for tensor in network._inputs:
        if -1 in tensor.shape and not config._profiles:
            return (
                4,
                "Internal Error",
                "Network has dynamic or shape inputs, but no optimization profile has been defined.",
            )
        if -1 in tensor.shape and tensor.name not in profiled:
            return 4, "Internal Error", f"input {tensor.name} is dynamic, but the profile has no shape for it"
    used = {layer["precision"] for layer in layers}
    flags = {flag.name for flag in config._flags}
    for precision in ("fp16", "int8"):
        flag = precision.upper()
        if network._typed and flag in flags:
            return 3, "API Usage Error", f"BuilderFlag::k{flag} must not be set for a strongly typed network"
        if not network._typed and precision in used and flag not in flags:
            name = flag.lower() if precision == "fp16" else "Int8"
            text = f"{name} precision has been set for a layer or layer output, but {precision} is not configured"
            return 4, "Internal Error", text
    if _V >= (8, 6) and config.hardware_compatibility_level.name == "AMPERE_PLUS" and _SM < 80:
        return 9, "API Usage Error", "hardware compatibility needs an Ampere GPU or a newer one"
    if config.default_device_type is DeviceType.DLA and "GPU_FALLBACK" not in flags and "fp32" in used:
        return 9, "Internal Error", "a layer cannot run on DLA, and GPU fallback is not enabled"
    return None


def _time(config: IBuilderConfig, layers: list[dict[str, Any]]) -> bool:
    """Time the layers that the cache does not know; False when the monitor breaks off."""
    global _layers_timed  # noqa: PLW0603
    known = config._cache._content["timed"] if config._cache else []
    unknown = [layer for layer in layers if json.dumps(layer) not in known]
    monitor = config.progress_monitor if _V >= (10,) else None
    if monitor:
        monitor.phase_start("Building Engine", None, len(unknown))
    for step, layer in enumerate(unknown):
        known.append(json.dumps(layer))
        if monitor and not monitor.step_complete("Building Engine", step):
            return False
    if monitor:
        monitor.phase_finish("Building Engine")
    _layers_timed = len(unknown)
    return True


def _layers(network: INetworkDefinition, config: IBuilderConfig) -> list[dict[str, Any]]:
    """Return the layers as TensorRT would fuse them, each with its precision."""
    graph = network._model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.input]}
    producers = {output: node for node in graph.node for output in node.output}
    consumers = {name: node for node in graph.node for name in node.input}
    fused, layers = set(), []
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Constant") or node.name in fused:
            continue
        product = node.op_type in ("Conv", "Gemm", "MatMul")
        from_int8 = [
            producers[name]
            for name in node.input[:2]
            if name in producers and producers[name].op_type == "DequantizeLinear"
        ]
        name, nodes = node.name, [node.name]
        precision = "fp16" if types.get(node.input[0]) == onnx.TensorProto.FLOAT16 else "fp32"
        if product and len(from_int8) == 2:
            precision = "int8"
            weight = from_int8[1].input[0]
            name = f"{weight} + {weight}_QuantizeLinear + {name}"
        following = consumers.get(node.output[0])
        if product and following is not None and following.op_type == "Relu":
            fused.add(following.name)
            nodes.append(following.name)
            name += f" + {following.name}"
        if node.name == _FP32:
            precision = "fp32"
        layer = {"Name": name, "precision": precision, "type": node.op_type, "input": node.input[0], "nodes": nodes}
        layers.append(layer)
    if config.default_device_type is DeviceType.DLA:
        name = f"{{ForeignNode[{layers[0]['Name']}...{layers[-1]['Name']}]}}"
        nodes = [node for layer in layers for node in layer["nodes"]]
        layers = [{"Name": name, "precision": "fp16", "type": "DLA", "input": layers[0]["input"], "nodes": nodes}]
    return layers


_HEADER = "<4sIQQ4B"  # tag, version of the serialisation, unknown, size of the plan, version


def _plan(about: bytes, model: bytes) -> bytes:
    # older plans hold something else in the version's place (trtexec's printPlanVersion asks for 8.6 and newer)
    version = [int(part) for part in __version__.split(".")] if _V >= (8, 6) else [0xD5, 0, 0, 0]
    size = struct.calcsize(_HEADER) + 4 + len(about) + len(model)
    return struct.pack(_HEADER, b"ftrt", 0, 2, size, *version) + struct.pack("<I", len(about)) + about + model


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        def refuse(code: int, kind: str, text: str) -> None:
            message = f"IRuntime::deserializeCudaEngine: Error Code {code}: {kind} ({text})"
            self._logger.log(ILogger.Severity.ERROR, message)

        plan = bytes(memoryview(serialized_engine))
        start = struct.calcsize(_HEADER)
        if plan[:4] != b"ftrt" or len(plan) < start or struct.unpack_from(_HEADER, plan)[3] != len(plan):
            return refuse(1, "Serialization", "Serialization assertion plan->header.size == blobSize failed.")
        (length,) = struct.unpack_from("<I", plan, start)
        about = json.loads(plan[start + 4 : start + 4 + length])
        if about["version"] != __version__:
            return refuse(
                6,
                "API Usage Error",
                "The engine plan file is not compatible with this version of TensorRT, expecting library version "
                f"{__version__} got {about['version']}, please rebuild.",
            )
        compatible = about["compatible"] == "AMPERE_PLUS" and _SM >= 80
        if about["sm"] != _SM and not compatible:
            return refuse(
                6,
                "API Usage Error",
                "The engine plan file is generated on an incompatible device, expecting compute "
                f"{_SM / 10} got compute {about['sm'] / 10}, please rebuild.",
            )
        return ICudaEngine(about, onnx.load_from_string(plan[start + 4 + length :]), self._logger)


class IRuntimeConfig:
    """Has nothing of TensorRT for RTX's runtime cache."""

    __slots__ = ()


class ICudaEngine:
    def __init__(self, about: dict[str, Any], model: onnx.ModelProto, logger: ILogger) -> None:
        import onnxruntime as ort

        constants = {tensor.name for tensor in model.graph.initializer}
        inputs = [ITensor(value) for value in model.graph.input if value.name not in constants]
        self._about, self._logger = about, logger
        self._inputs = {tensor.name: tensor for tensor in inputs}
        self._tensors = self._inputs | {value.name: ITensor(value) for value in model.graph.output}
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def get_tensor_dtype(self, name: str) -> Any:
        return self._tensors[name].dtype

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)

    if _V >= (10, 11):

        def create_runtime_config(self) -> IRuntimeConfig:
            return IRuntimeConfig()


_FORMATS = {
    "fp32": ("Row major linear", "FP32", "Float"),
    "fp16": ("Channel major", "FP16 format where channel % 8 == 0", "Half"),
    "int8": ("Thirty-two wide channel vectorized row major", "Int8 format", "Int8"),
}


class EngineInspector:
    __slots__ = ("_engine", "execution_context")

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self.execution_context: IExecutionContext | None = None

    def get_engine_information(self, format: Any) -> str:
        assert format is LayerInformationFormat.JSON
        about, tensors = self._engine._about, self._engine._tensors
        layers = [self._layer(layer) if about["detailed"] else layer["Name"] for layer in about["layers"]]
        if _V < (11,):
            return json.dumps({"Layers": layers, "Bindings": list(tensors)})
        io = [{"Name": t.name, "Dimensions": t.shape, "Location": "Device"} for t in tensors.values()]
        return json.dumps({"Layers": layers, "I/O Tensors": io})

    def _layer(self, layer: dict[str, Any]) -> dict[str, Any]:
        layout, suffix, name = _FORMATS[layer["precision"]]
        tensor: dict[str, Any] = {"Name": layer["input"], "Location": "Device"}
        if _V >= (11,):
            tensor |= {"Format": layout, "Datatype": name}
        elif _V < (10,) and not self._shapes_are_known():
            tensor |= {"Format/Datatype": "N/A due to dynamic shapes"}
        else:
            tensor |= {"Format/Datatype": f"{layout} {suffix}"}
        information = {"Name": layer["Name"], "LayerType": layer["type"], "Inputs": [tensor], "Outputs": []}
        if _V >= (10,):  # what the parser has written, with the record separator between
            information["Metadata"] = "\x1e".join(f"[ONNX Layer: {node}]" for node in layer["nodes"])
        if layer["type"] in ("Conv", "Gemm"):
            information["Weights"] = {"Type": name, "Count": 1}
        return information

    def _shapes_are_known(self) -> bool:
        if all(-1 not in tensor.shape for tensor in self._engine._inputs.values()):
            return True
        return self.execution_context is not None and self.execution_context._ready()


class IProfiler:
    _constructed = False

    def __init__(self) -> None:
        self._constructed = True

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profiler: IProfiler | None = None
        self._runs = 0
        self._shapes = {tensor.name: tensor.shape for tensor in engine._inputs.values()}
        self._addresses: dict[str, int] = {}
        self._prepared: dict[str, tuple[int, ...]] = {}

    def _fail(self, text: str) -> bool:
        message = f"IExecutionContext::enqueueV3: Error Code 3: API Usage Error ({text})"
        self._engine._logger.log(ILogger.Severity.ERROR, message)
        return False

    def _ready(self) -> bool:
        return all(-1 not in shape for shape in self._shapes.values())

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine._about["shapes"].get(name, (self._shapes[name],) * 3)
        if len(shape) != len(low) or any(not a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self._fail(
                f"Set dimension {shape} for tensor {name} does not satisfy any optimization profiles."
            )
        self._shapes[name] = tuple(shape)
        return True

    @property
    def profiler(self) -> IProfiler | None:
        return self._profiler

    @profiler.setter
    def profiler(self, profiler: IProfiler | None) -> None:
        if profiler is not None and not (isinstance(profiler, IProfiler) and profiler._constructed):
            raise TypeError("(): incompatible function arguments")
        self._profiler = profiler

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, shapes, addresses = self._engine, dict(self._shapes), dict(self._addresses)
        if not self._ready():
            return self._fail("Not all input shapes are specified")
        if set(addresses) != set(engine._tensors):
            return self._fail("Address is not set for some tensor")
        if self._prepared != shapes:  # the first run in a shape allocates
            self._prepared = shapes
            if gpu.break_captures():
                return self._fail("operation not permitted when stream is capturing")

        def infer() -> None:
            feeds = {}
            for name, shape in shapes.items():
                kind = np.dtype(_NUMPY[engine.get_tensor_dtype(name)])
                assert gpu.holds(addresses[name], int(np.prod(shape)) * kind.itemsize), "illegal memory access"
                feeds[name] = np.frombuffer(
                    ctypes.string_at(addresses[name], int(np.prod(shape)) * kind.itemsize), kind
                ).reshape(shape)
            outputs = [name for name in engine._tensors if name not in engine._inputs]
            for name, value in zip(outputs, engine._session.run(outputs, feeds), strict=True):
                assert gpu.holds(addresses[name], value.nbytes), "illegal memory access"
                ctypes.memmove(addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)

        gpu.streams[stream_handle].enqueue(infer)
        if self._profiler is not None:  # enqueue_emits_profile is True: it waits for what was enqueued, and reports
            if gpu.break_captures():
                return self._fail("operation not permitted when stream is capturing")
            gpu.streams[stream_handle].wait()
            self._runs += 1
            for index, layer in enumerate(engine._about["layers"]):  # the first runs are slow
                self._profiler.report_layer_time(layer["Name"], (index + 1) * (0.01 if self._runs > 5 else 1.0))
        return True


_NUMPY = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT8: np.int8,
    DataType.INT32: np.int32,
    DataType.BOOL: np.bool_,
    DataType.UINT8: np.uint8,
}


def nptype(trt_type: Any) -> Any:
    return _NUMPY[trt_type]
