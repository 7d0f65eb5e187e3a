"""NVIDIA's trtexec: builds and measures where TensorRT has no usable Python bindings.

What a version knows and says was read in NVIDIA/TensorRT, ``samples/common/sampleOptions.cpp`` and
``samples/trtexec/trtexec.cpp``, at the tags 8.5.2, 8.6.1, 10.3, 10.9, 10.13.3, 10.16, 11.0 and 11.1.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any

from .protocol import OutOfMemory, Refusal, progress

_PLACES = ("/usr/src/tensorrt/bin/trtexec", "/opt/tensorrt/bin/trtexec")  # JetPack, NVIDIA's containers

# First and last (major, minor) that take a flag: an unknown one ends trtexec. From 11.0 on the last three are
# taken too, and do nothing but warn.
_NEWEST = (999, 0)
_FLAGS = {
    "--builderOptimizationLevel": ((8, 6), _NEWEST),
    "--hardwareCompatibilityLevel=ampere+": ((8, 6), _NEWEST),
    "--hardwareCompatibilityLevel=sameComputeCapability": ((10, 9), _NEWEST),
    "--fp16": ((8, 5), (10, 99)),
    "--int8": ((8, 5), (10, 99)),
    "--stronglyTyped": ((10, 0), (10, 99)),
    "--noCudaGraph": ((11, 0), _NEWEST),
    "--useCudaGraph": ((8, 5), (10, 99)),
    "--useSpinWait": ((8, 5), (10, 99)),
    "--noDataTransfers": ((8, 5), (10, 99)),
}
_COMPATIBILITY = {"ampere+": "ampere+", "same-compute-capability": "sameComputeCapability"}

_PHASES = {
    "Start parsing network model": "reading the ONNX file",
    "iming cache in use": "timing kernels",
    "Engine built in": "writing the engine",
    "Capturing CUDA graph": "capturing a CUDA graph",
    "Starting inference": "running the engine",
}
_NO_MEMORY = re.compile(
    r"OutOfMemory|out of memory|insufficient memory|memory is insufficient|cudaErrorMemoryAllocation|bad_alloc"
    r"|GPU memory \(\d+ bytes\) could not be allocated",
    re.IGNORECASE,
)
# what trtexec says after the error that counts
_CONCLUSIONS = re.compile(
    r"(Engine set up|Parsing model|Building engine|Inference set up|Engine deserialization|Engine creation"
    r"|Network And Config setup) failed|Failed to (create engine from model|parse onnx file)"
    r"|could not be created from network|Error occurred during inference|Got invalid engine"
)
_NODE = re.compile(r"While parsing node number \d+ \[(?P<operator>\S+) -> \"(?P<output>[^\"]*)\"")
_CAUSE = re.compile(r"ERROR: \S+ In function \S+\s+\[\d+\] (.*)")
_FOREIGN = re.compile(
    r"not compatible with this version of TensorRT|Version tag does not match|generated on an incompatible device"
)
_BAD_CACHE = "TimingCache creation failed"


def find() -> str | None:
    """Return the path of trtexec: ``$TRTEXEC``, PATH, or where JetPack and NVIDIA's containers have it.

    Raises:
        Refusal: ``$TRTEXEC`` names no program.
    """
    named = os.environ.get("TRTEXEC")
    if named:
        if shutil.which(named) is None:
            raise Refusal("$TRTEXEC is {}, which is no program".format(named), "correct it or unset it")
        return shutil.which(named)
    return shutil.which("trtexec") or next((place for place in _PLACES if os.access(place, os.X_OK)), None)


def version(path: str) -> tuple[int, ...]:
    """Return TensorRT's (major, minor, patch), and the build number where trtexec tells it (10.4 and newer).

    Raises:
        Refusal: It does not start, or is no trtexec.
    """
    try:
        answer = subprocess.run(
            [path, "--help"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except OSError as error:
        raise Refusal("{} does not start: {}".format(path, error.strerror), "install TensorRT's trtexec") from error
    text = answer.stdout.decode(errors="replace")
    banner = re.search(r"\[TensorRT v(\d+)\](?: \[b(\d+)\])?", text)
    if banner is None:
        first = (text.strip().splitlines() or ["it says nothing"])[0]
        raise Refusal("{} is not a working trtexec: {}".format(path, first), "install TensorRT's trtexec")
    number = int(banner.group(1))
    base = 100 if number >= 100000 else 10  # 8502 is 8.5.2, 100300 is 10.3.0
    found = (number // (base * 100), number // 100 % base, number % 100)
    return found + ((int(banner.group(2)),) if banner.group(2) else ())


def build(
    path: str, request: dict[str, Any], *, workspace: int | None, cache: str | None, out: str
) -> dict[str, Any]:
    """Build an engine from an ONNX file.

    Args:
        path: trtexec.
        request: ``onnx`` (path), ``precision`` (what the graph holds), ``input`` (``name``, ``shape`` without the
            batch), ``batches`` (``min``, ``opt``, ``max``, or None when the batch is fixed), ``options``
            (``optimization_level``, ``dla_core``, ``hardware_compatibility``).
        workspace: Limit of the builder's scratch memory in bytes; rounded down to MiB.
        cache: Timing cache, read when it is there and written anew; dropped when it is damaged.
        out: The engine; nothing is written there unless the build is complete.

    Returns:
        ``layers`` (what ``--exportLayerInfo`` wrote, in that version's form) and ``command``.

    Raises:
        OutOfMemory: A smaller workspace may do.
        Refusal: Anything else, with trtexec's own reason.
    """
    here = version(path)
    flags = _build_flags(here, request, workspace)
    scratch = out + ".partial"
    shutil.rmtree(scratch, ignore_errors=True)
    os.makedirs(scratch)
    engine, layers, timings = (os.path.join(scratch, name) for name in ("engine", "layers.json", "timing.cache"))
    command = [path, "--onnx=" + request["onnx"], "--saveEngine=" + engine, "--exportLayerInfo=" + layers, *flags]
    if cache is not None:
        command.append("--timingCacheFile=" + timings)
    try:
        if cache is not None and os.path.isfile(cache):
            shutil.copyfile(cache, timings)
        code, log = _run(command)
        if cache is not None and _BAD_CACHE in log:
            progress(0, 0, "warning: the timing cache is damaged and was dropped")
            os.unlink(cache)
            os.unlink(timings)
            if code != 0:  # up to 10.2; newer ones go on without a cache
                code, log = _run(command)
        if code != 0:
            raise _failure(here, code, log)
        with open(layers, encoding="utf-8") as file:
            information = json.load(file, strict=False)
        if cache is not None and os.path.isfile(timings):
            shutil.copyfile(timings, cache + ".new")
            os.replace(cache + ".new", cache)
        os.replace(engine, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {"layers": information, "command": command}


def latency(
    path: str,
    engine: str,
    *,
    network_input: dict[str, Any],
    dynamic: bool,
    batch: int,
    warmup_ms: float,
    duration_ms: float,
    queries: int,
    input_file: str | None = None,
) -> dict[str, Any]:
    """Measure an engine on random input, or on the bytes of ``input_file``.

    The latencies are trtexec's ``computeMs``, the time between two events on the GPU around one query. The next
    query is already enqueued meanwhile, so the host's clock would count the wait for the one before; and without
    data transfers ``latencyMs`` is the same figure.

    Args:
        path: trtexec.
        engine: The engine.
        network_input: ``name`` and ``shape`` (without the batch) of the engine's input.
        dynamic: Whether the engine takes batches of several sizes.
        batch: Samples in a query.
        warmup_ms: Milliseconds before anything counts.
        duration_ms: Milliseconds to measure, at least.
        queries: Queries to measure, at least.
        input_file: One query's input as raw bytes.

    Returns:
        ``latencies`` (nanoseconds of each query, in order), ``samples_per_s`` (over the whole measurement),
        and ``settings`` for the record.

    Raises:
        OutOfMemory: The engine does not fit.
        Refusal: It cannot be loaded or run, with trtexec's own reason.
    """
    here = version(path)
    command = [path, "--loadEngine=" + engine]
    # 11.0 made these the default
    command += [flag for flag in ("--useCudaGraph", "--useSpinWait", "--noDataTransfers") if _knows(here, flag)]
    command += ["--warmUp={:g}".format(warmup_ms), "--duration={:g}".format(duration_ms / 1000)]
    command.append("--iterations={}".format(queries))
    if dynamic:
        command.append("--shapes=" + _shape(network_input, batch))
    if input_file is not None:
        command.append("--loadInputs='{}':{}".format(network_input["name"], input_file))
    with tempfile.TemporaryDirectory() as scratch:
        times = os.path.join(scratch, "times.json")
        code, log = _run([*command, "--exportTimes=" + times])
        if code != 0:
            raise _failure(here, code, log)
        with open(times, encoding="utf-8") as file:
            traces = json.load(file)
    span = traces[-1]["endComputeMs"] - traces[0]["startComputeMs"]
    return {
        "latencies": [round(trace["computeMs"] * 1e6) for trace in traces],
        "samples_per_s": len(traces) * batch / span * 1000,
        "settings": {
            "tool": "trtexec",
            "tensorrt": _dotted(here),
            "figure": "GPU compute time",
            "cuda_graph": "not permitted under CUDA graph capture" not in log,
            "spin_wait": True,
            "data_transfers": False,
            "streams": 1,
            "command": command,
        },
    }


def profile(
    path: str, engine: str, *, network_input: dict[str, Any], dynamic: bool, queries: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Time an engine's layers on random input of batch 1, without a CUDA graph.

    Args:
        path: trtexec.
        engine: The engine.
        network_input: ``name`` and ``shape`` (without the batch) of the engine's input.
        dynamic: Whether the engine takes batches of several sizes.
        queries: To take the median of.

    Returns:
        Each layer's median in microseconds, in the order they run, and what the engine inspector says of them.

    Raises:
        OutOfMemory: The engine does not fit.
        Refusal: It cannot be loaded or run, with trtexec's own reason.
    """
    here = version(path)
    command = [path, "--loadEngine=" + engine, "--duration=0", "--iterations={}".format(queries)]
    if dynamic:
        command.append("--shapes=" + _shape(network_input, 1))
    if _knows(here, "--noCudaGraph"):
        command.append("--noCudaGraph")
    with tempfile.TemporaryDirectory() as scratch:
        times, layers = (os.path.join(scratch, name) for name in ("times.json", "layers.json"))
        code, log = _run([*command, "--exportProfile=" + times, "--exportLayerInfo=" + layers])
        if code != 0:
            raise _failure(here, code, log)
        with open(times, encoding="utf-8") as file:
            _, *entries = json.load(file, strict=False)  # the first one tells the number of queries
        with open(layers, encoding="utf-8") as file:
            information = dict(json.load(file, strict=False))
    medians: dict[str, float] = {}
    for entry in entries:
        medians[entry["name"]] = medians.get(entry["name"], 0.0) + entry["medianMs"] * 1000
    return medians, information


def _knows(here: tuple[int, ...], flag: str) -> bool:
    first, last = _FLAGS[flag]
    return first <= here[:2] <= last


def _dotted(here: tuple[int, ...]) -> str:
    return ".".join(map(str, here))


def _shape(network_input: dict[str, Any], batch: int) -> str:
    return "{}:{}".format(network_input["name"], "x".join(map(str, [batch] + network_input["shape"])))


def _build_flags(here: tuple[int, ...], request: dict[str, Any], workspace: int | None) -> list[str]:
    """Return the flags of a build that this version takes."""
    if here < (8, 5):
        raise Refusal(
            "the device has TensorRT {}, which is too old".format(_dotted(here)), "update to TensorRT 8.5 or newer"
        )
    options, precision = request["options"], request["precision"]

    def wanted(flag: str, option: str) -> str:
        if not _knows(here, flag):
            raise Refusal(
                "TensorRT {} has no {}".format(_dotted(here), flag),
                "leave {} out, or use TensorRT {} or newer".format(option, _dotted(_FLAGS[flag][0])),
            )
        return flag

    # Ten queries right after the build, instead of --skipInference: an engine of several batch sizes tells its
    # layers' types only when it is asked at one size ("N/A due to dynamic shapes").
    flags = ["--profilingVerbosity=detailed", "--warmUp=0", "--duration=0"]
    if request["batches"] is not None:
        for name in ("min", "opt", "max"):
            flags.append("--{}Shapes={}".format(name, _shape(request["input"], request["batches"][name])))
    if workspace is not None:
        flags.append("--memPoolSize=workspace:{}".format(max(workspace >> 20, 1)))
    level = options["optimization_level"]
    if level is not None:
        flags.append("{}={}".format(wanted("--builderOptimizationLevel", "the optimization level"), level))
    if options["hardware_compatibility"] not in (None, "none"):
        flag = "--hardwareCompatibilityLevel=" + _COMPATIBILITY[options["hardware_compatibility"]]
        flags.append(wanted(flag, "hardware compatibility"))
    if precision == "fp32":
        flags.append("--noTF32")
    on_dla = options["dla_core"] is not None
    if on_dla:
        if precision == "fp32":
            raise Refusal("a DLA computes fp16 and int8, not fp32", "use --precision fp16 or int8, or no DLA")
        flags += ["--useDLACore={}".format(options["dla_core"]), "--allowGPUFallback"]
    # trtexec 10 sets builder flags for a DLA that a strongly typed network does not take
    if _knows(here, "--stronglyTyped") and not on_dla:
        flags.append("--stronglyTyped")
    elif _knows(here, "--fp16"):
        if precision == "int8":
            flags.append("--int8")
        if precision == "fp16" or (precision == "int8" and "fp16" in request["expected"].values()):
            flags.append("--fp16")
    return flags


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: whatever ends the agent ends trtexec


def _run(command: list[str]) -> tuple[int, str]:
    """Run trtexec; return its exit status (negative: a signal) and what it said, which also goes to stderr."""
    lines = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        preexec_fn=_die_with_parent,  # noqa: PLW1509 (the agent has one thread)
    ) as process:
        assert process.stdout
        try:
            for line in process.stdout:
                lines.append(line)
                sys.stderr.write(line)
                for sign, text in _PHASES.items():
                    if sign in line:
                        progress(0, 0, text)
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    return process.returncode, "".join(lines)


def _failure(here: tuple[int, ...], code: int, log: str) -> Exception:
    """Return what ended trtexec."""
    errors = [text.strip() for text in re.findall(r"\[[EF]\] (?:\[TRT\] )?(.*)", log)]
    telling = [text for text in errors if not _CONCLUSIONS.search(text)] or errors or ["it gave no reason"]
    reason, tensorrt = telling[-1], "TensorRT " + _dotted(here)
    if code == -signal.SIGKILL:
        return OutOfMemory("trtexec was killed (SIGKILL), as the kernel does when memory runs out")
    if code < 0:
        return Refusal(
            "trtexec of {} crashed ({}); its last error: {}".format(tensorrt, signal.Signals(-code).name, reason),
            "run the same command again; if it crashes again, try another TensorRT or --precision",
        )
    node = _NODE.search(log)
    if node is not None:
        begin, cause = log[node.end() :], _CAUSE.search(log, node.end())
        name = re.search(r"^name: \"(.*)\"", begin.partition("--- End node ---")[0], re.MULTILINE)
        return Refusal(
            "{} does not take operator {} (node {}): {}".format(
                tensorrt,
                node.group("operator"),
                name.group(1) if name else "of output " + node.group("output"),
                cause.group(1) if cause else reason,
            ),
            "express that part of the model with other operators, or use a newer TensorRT",
        )
    if "insufficient workspace" in log:  # the opposite of too little memory
        return Refusal("{}: {}".format(tensorrt, reason), "allow the builder a larger workspace")
    shortage = [line for line in log.splitlines() if _NO_MEMORY.search(line)]
    if shortage:
        return OutOfMemory(re.sub(r"^(\[[^\]]*\] )+", "", shortage[-1]).strip())
    if _FOREIGN.search(log):
        return Refusal(
            "the engine was built for another TensorRT or GPU than the device's: {}".format(reason),
            "build it again for this device (--rerun build)",
        )
    if "--loadEngine=" in log:
        return Refusal("{} cannot run the engine: {}".format(tensorrt, reason), "build it again (--rerun build)")
    return Refusal(
        "{} cannot build the engine: {}".format(tensorrt, reason), "run again with -v for trtexec's whole output"
    )
