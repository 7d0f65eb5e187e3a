"""The builder and the stopwatch over trtexec, against a stand-in that plays each version's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from toolkit import graphs
from toolkit.agent import trtexec
from toolkit.agent.protocol import OutOfMemory, Refusal

STANDIN = Path(__file__).parent / "standins" / "trtexec"
VERSIONS = {
    "8.5": (8, 5, 2),
    "8.6": (8, 6, 1),
    "10.3": (10, 3, 0),
    "10.13": (10, 13, 3, 9),
    "10.16": (10, 16, 2, 10),
    "11.0": (11, 0, 0, 114),
    "11.1": (11, 1, 0, 106),
}
INPUT = {"name": "images", "shape": [3, 8, 8]}
BATCHES = {"min": 1, "opt": 8, "max": 32}

every_version = pytest.mark.parametrize("release", VERSIONS)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Set what the stand-in plays and return its path."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def set_up(release: str, **told: object) -> str:
        monkeypatch.setenv("TRTEXEC_STANDIN", release)
        for name, value in told.items():
            monkeypatch.setenv(f"TRTEXEC_STANDIN_{name.upper()}", str(value))
        return str(STANDIN)

    return set_up


def network(path: Path, precision: str = "fp32", batch: int | None = None, operator: str = "Relu") -> Path:
    """Write a small classifier of uint8 images; ``int8+fp16`` is a Q/DQ graph whose rest is fp16."""
    kind = np.float16 if "fp16" in precision else np.float32
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    random = np.random.default_rng(0)
    weights = {
        "kernel": random.normal(size=(4, 3, 3, 3)).astype(kind),
        "matrix": random.normal(size=(4, 10)).astype(kind),
    }
    nodes = [helper.make_node("Cast", ["images"], ["pixels"], "cast", to=element)]
    entry, kernel = "pixels", "kernel"
    if "int8" in precision:
        weights["kernel"] = random.integers(-9, 9, (4, 3, 3, 3)).astype(np.int8)
        weights |= {"scale": np.array(0.1, kind), "zero": np.array(0, np.int8)}
        nodes += [
            helper.make_node("QuantizeLinear", ["pixels", "scale", "zero"], ["quantized"], "q"),
            helper.make_node("DequantizeLinear", ["quantized", "scale", "zero"], ["entry"], "dq"),
            helper.make_node("DequantizeLinear", ["kernel", "scale", "zero"], ["weight"], "dqw"),
        ]
        entry, kernel = "entry", "weight"
    nodes += [
        helper.make_node("Conv", [entry, kernel], ["features"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node(operator, ["features"], ["active"], "activation"),
        helper.make_node("GlobalAveragePool", ["active"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "matrix"], ["half"], "head"),
        helper.make_node("Cast", ["half"], ["logits"], "out", to=TensorProto.FLOAT),
    ]
    size: Any = batch or "batch"
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [size, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [size, 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)]), path)
    return path


def request(path: Path, precision: str = "fp32", batches: dict[str, int] | None = BATCHES, **options: Any) -> Any:
    plain = {"optimization_level": None, "dla_core": None, "hardware_compatibility": "none"}
    wanted = {"onnx": str(path), "precision": precision, "input": INPUT, "batches": batches}
    return wanted | {"expected": graphs.precisions(path), "options": plain | options}


def built(tool: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Build a small fp32 engine in ``folder/engine``."""
    asked = request(network(folder / "model.onnx"), **options)
    return trtexec.build(tool, asked, workspace=64 << 20, cache=None, out=str(folder / "engine"))


def measure(tool: str, folder: Path, **settings: Any) -> dict[str, Any]:
    plain = {"network_input": INPUT, "dynamic": True, "batch": 1, "warmup_ms": 20, "duration_ms": 50, "queries": 40}
    return trtexec.latency(tool, str(folder / "engine"), **(plain | settings))


def types(layers: dict[str, Any], name: str) -> str:
    """Return the type and format of a layer's first input, in whatever form the version has it."""
    tensor = next(layer for layer in layers["Layers"] if layer["Name"] == name)["Inputs"][0]
    return str(tensor.get("Format/Datatype", tensor.get("Datatype")))


@every_version
def test_the_version_is_read_from_the_banner(play: Callable[..., str], release: str) -> None:
    assert trtexec.version(play(release)) == VERSIONS[release]


@every_version
@pytest.mark.parametrize("batch", [None, 4], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8+fp16"])
def test_every_version_takes_the_build(
    play: Callable[..., str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    release: str,
    precision: str,
    batch: int | None,
) -> None:
    tool = play(release)
    model = network(tmp_path / "model.onnx", precision, batch)
    asked = request(model, precision.removesuffix("+fp16"), None if batch else BATCHES)
    out = tmp_path / "engine"
    result = trtexec.build(tool, asked, workspace=512 << 20, cache=str(tmp_path / "timing.cache"), out=str(out))
    log = capfd.readouterr().err
    assert "deprecated" not in log
    assert "Invalid usage" not in log
    assert out.is_file()
    expected = {"fp32": "FP32|Float", "fp16": "FP16|Half", "int8": "Int8", "int8+fp16": "Int8"}[precision]
    assert any(word in types(result["layers"], "conv") for word in expected.split("|"))
    flags = {part.partition("=")[0] for part in result["command"][1:]}
    precise = {"--fp16", "--int8", "--stronglyTyped"} & flags
    if VERSIONS[release] >= (11,):
        assert not precise
    elif VERSIONS[release] >= (10,):
        assert precise == {"--stronglyTyped"}
    else:
        assert precise == {"--" + part for part in precision.split("+") if part != "fp32"}
    assert ("--noTF32" in flags) == (precision == "fp32")
    assert "--memPoolSize=workspace:512" in result["command"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "model.onnx", "timing.cache"]


@every_version
def test_layers_are_told_at_a_real_batch(play: Callable[..., str], tmp_path: Path, release: str) -> None:
    layers = built(play(release), tmp_path)["layers"]
    conv = next(layer for layer in layers["Layers"] if layer["Name"] == "conv")
    assert conv["Inputs"][0]["Dimensions"] == [BATCHES["opt"], 3, 8, 8]
    assert "N/A" not in json.dumps(layers)


def test_a_layer_in_another_precision_shows(play: Callable[..., str], tmp_path: Path) -> None:
    tool = play("10.3", fp32="conv")
    asked = request(network(tmp_path / "model.onnx", "fp16"), "fp16")
    layers = trtexec.build(tool, asked, workspace=None, cache=None, out=str(tmp_path / "engine"))["layers"]
    assert "FP32" in types(layers, "conv")
    assert "FP16" in types(layers, "activation")


@every_version
@pytest.mark.parametrize(
    ("option", "first"),
    [
        ({"optimization_level": 2}, (8, 6)),
        ({"hardware_compatibility": "ampere+"}, (8, 6)),
        ({"hardware_compatibility": "same-compute-capability"}, (10, 9)),
    ],
    ids=str,
)
def test_an_option_is_passed_or_refused(
    play: Callable[..., str], tmp_path: Path, release: str, option: dict[str, Any], first: tuple[int, int]
) -> None:
    tool = play(release)
    if VERSIONS[release] >= first:
        built(tool, tmp_path, **option)
        assert (tmp_path / "engine").is_file()
        return
    with pytest.raises(Refusal, match=r"TensorRT 8\.5\.2 has no|has no .*sameComputeCapability") as refused:
        built(tool, tmp_path, **option)
    assert "{}.{}".format(*first) in str(refused.value.hint)


@pytest.mark.parametrize("release", ["8.5", "8.6", "10.3"])
def test_a_dla_gets_builder_flags_and_falls_back_to_the_gpu(
    play: Callable[..., str], tmp_path: Path, release: str
) -> None:
    asked = request(network(tmp_path / "model.onnx", "fp16"), "fp16", dla_core=1)
    command = trtexec.build(play(release), asked, workspace=None, cache=None, out=str(tmp_path / "e"))["command"]
    assert {"--useDLACore=1", "--allowGPUFallback", "--fp16"} <= set(command)
    assert "--stronglyTyped" not in command


def test_a_dla_that_is_not_there_or_cannot_do_it_is_refused(play: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="a DLA computes fp16 and int8"):
        built(play("10.3"), tmp_path, dla_core=0)
    asked = request(network(tmp_path / "model.onnx", "fp16"), "fp16", dla_core=0)
    with pytest.raises(Refusal, match="Cannot create DLA engine, 0 not available"):
        trtexec.build(play("11.0"), asked, workspace=None, cache=None, out=str(tmp_path / "engine"))


@every_version
@pytest.mark.parametrize("batch", [1, 8])
def test_latency_means_the_same_in_every_version(
    play: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str], release: str, batch: int
) -> None:
    tool = play(release)
    built(tool, tmp_path)
    capfd.readouterr()
    result = measure(tool, tmp_path, batch=batch)
    assert "deprecated" not in capfd.readouterr().err
    latencies = np.array(result["latencies"])
    # the stand-in takes half a millisecond a sample, and more with transfers or without a CUDA graph
    assert np.abs(latencies / (500_000 * batch) - 1).max() <= 0.011
    assert len(latencies) >= 40
    assert result["samples_per_s"] == pytest.approx(2000, rel=0.02)
    assert result["settings"]["cuda_graph"] is True
    assert result["settings"]["tensorrt"] == ".".join(map(str, VERSIONS[release]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "model.onnx"]


@every_version
def test_latency_of_a_fixed_batch_on_given_bytes(play: Callable[..., str], tmp_path: Path, release: str) -> None:
    tool = play(release)
    asked = request(network(tmp_path / "model.onnx", batch=4), batches=None)
    trtexec.build(tool, asked, workspace=None, cache=None, out=str(tmp_path / "engine"))
    data = tmp_path / "in:put.bin"
    data.write_bytes(bytes(4 * 3 * 8 * 8))
    result = measure(tool, tmp_path, dynamic=False, batch=4, input_file=str(data))
    assert result["samples_per_s"] == pytest.approx(2000, rel=0.02)
    data.write_bytes(bytes(7))
    with pytest.raises(Refusal, match="Unexpected file size"):
        measure(tool, tmp_path, dynamic=False, batch=4, input_file=str(data))


def test_a_batch_beyond_the_profile_is_refused(play: Callable[..., str], tmp_path: Path) -> None:
    tool = play("10.16")
    built(tool, tmp_path)
    with pytest.raises(Refusal, match="does not satisfy any optimization profiles"):
        measure(tool, tmp_path, batch=33)


@every_version
def test_out_of_memory_is_told_apart(play: Callable[..., str], tmp_path: Path, release: str) -> None:
    tool = play(release, memory=256)
    asked, out = request(network(tmp_path / "model.onnx")), tmp_path / "engine"
    with pytest.raises(OutOfMemory, match="OutOfMemory"):
        trtexec.build(tool, asked, workspace=512 << 20, cache=None, out=str(out))
    assert not out.exists()
    trtexec.build(tool, asked, workspace=256 << 20, cache=None, out=str(out))
    assert out.is_file()


def test_a_crash_is_named_by_its_signal(play: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"crashed \(SIGSEGV\)"):
        built(play("8.6", crash="SIGSEGV"), tmp_path)
    with pytest.raises(OutOfMemory, match="SIGKILL"):
        built(play("8.6", crash="SIGKILL"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]


@every_version
def test_an_unsupported_operator_is_named_with_its_node(
    play: Callable[..., str], tmp_path: Path, release: str
) -> None:
    asked = request(network(tmp_path / "model.onnx", operator="Wobble"))
    with pytest.raises(Refusal, match=r"operator Wobble \(node activation\).*Plugin not found") as refused:
        trtexec.build(play(release), asked, workspace=None, cache=None, out=str(tmp_path / "engine"))
    assert refused.value.hint


def test_what_is_no_onnx_file_is_refused(play: Callable[..., str], tmp_path: Path) -> None:
    asked = request(network(tmp_path / "model.onnx", "int8"), "int8")
    (tmp_path / "model.onnx").write_bytes(b"\x3a\xff\xff\x01 no graph")
    for release in ("8.5", "11.1"):
        with pytest.raises(Refusal, match="Failed to parse ONNX model from file"):
            trtexec.build(play(release), asked, workspace=None, cache=None, out=str(tmp_path / "engine"))


def test_shapes_for_a_fixed_batch_are_refused(play: Callable[..., str], tmp_path: Path) -> None:
    asked = request(network(tmp_path / "model.onnx", batch=1))
    with pytest.raises(Refusal, match="Static model does not take explicit shapes"):
        trtexec.build(play("10.3"), asked, workspace=None, cache=None, out=str(tmp_path / "engine"))


@every_version
def test_an_engine_of_another_version_is_refused(play: Callable[..., str], tmp_path: Path, release: str) -> None:
    built(play("8.5" if release != "8.5" else "10.3"), tmp_path)
    with pytest.raises(Refusal, match=r"another TensorRT or GPU.*expecting library version") as refused:
        measure(play(release), tmp_path)
    assert "--rerun build" in str(refused.value.hint)


@pytest.mark.parametrize("left", [0, 20, 100])
def test_a_truncated_engine_is_refused(play: Callable[..., str], tmp_path: Path, left: int) -> None:
    tool = play("10.3")
    built(tool, tmp_path)
    engine = tmp_path / "engine"
    engine.write_bytes(engine.read_bytes()[:left])
    with pytest.raises(Refusal, match=r"cannot run the engine.*Serialization assertion"):
        measure(tool, tmp_path)


@every_version
def test_the_timing_cache_is_kept_and_a_damaged_one_dropped(
    play: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str], release: str
) -> None:
    tool, cache, out = play(release), tmp_path / "timing.cache", tmp_path / "engine"
    asked = request(network(tmp_path / "model.onnx"))
    trtexec.build(tool, asked, workspace=None, cache=str(cache), out=str(out))
    kept = cache.read_bytes()
    asked = request(network(tmp_path / "other.onnx", batch=2), batches=None)
    trtexec.build(tool, asked, workspace=None, cache=str(cache), out=str(out))
    assert cache.read_bytes() != kept
    assert set(kept.split()) <= set(cache.read_bytes().split())
    cache.write_bytes(b"damaged")
    out.unlink()
    trtexec.build(tool, asked, workspace=None, cache=str(cache), out=str(out))
    assert "the timing cache is damaged and was dropped" in capfd.readouterr().out
    assert out.is_file()
    trtexec.build(tool, asked, workspace=None, cache=str(cache), out=str(out))
    assert len(cache.read_bytes()) > 7
    assert "damaged" not in capfd.readouterr().out


def test_a_failed_build_leaves_what_was_there(play: Callable[..., str], tmp_path: Path) -> None:
    engine, cache = tmp_path / "engine", tmp_path / "timing.cache"
    asked = request(network(tmp_path / "model.onnx"))
    trtexec.build(play("10.3"), asked, workspace=None, cache=str(cache), out=str(engine))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutOfMemory):
        trtexec.build(play("10.3", memory=1), asked, workspace=2 << 20, cache=str(cache), out=str(engine))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# after an interrupt: 130 when trtexec has ended by then, 1 when it has not
BUILDER = """
import json, os, sys
from toolkit.agent import trtexec
try:
    trtexec.build(**json.load(sys.stdin))
except KeyboardInterrupt:
    sys.exit(1 if open("/proc/self/task/{0}/children".format(os.getpid())).read() else 130)
"""


def half_written(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start a build in a process of its own; return it and trtexec's pid when half an engine lies there."""
    builder = subprocess.Popen([sys.executable, "-c", BUILDER], stdin=subprocess.PIPE)
    asked = {
        "path": str(STANDIN),
        "request": request(network(folder / "model.onnx")),
        "workspace": None,
        "cache": str(folder / "timing.cache"),
        "out": str(folder / "engine"),
    }
    assert builder.stdin
    builder.stdin.write(json.dumps(asked).encode())
    builder.stdin.close()
    partial = folder / "engine.partial" / "engine"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size):
        assert builder.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child = Path(f"/proc/{builder.pid}/task/{builder.pid}/children").read_text().strip()
    assert child
    return builder, child


def gone(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_an_interrupt_ends_trtexec_and_leaves_nothing_half_written(
    play: Callable[..., str], tmp_path: Path
) -> None:
    play("10.3", slow=600)
    builder, child = half_written(tmp_path)
    builder.send_signal(signal.SIGINT)
    assert builder.wait(60) == 130
    assert gone(child)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_trtexec_does_not_outlive_a_killed_agent(play: Callable[..., str], tmp_path: Path) -> None:
    play("11.0", slow=600)
    builder, child = half_written(tmp_path)
    builder.kill()
    builder.wait(60)
    deadline = time.monotonic() + 60
    while not gone(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not (tmp_path / "engine").exists()
    play("11.0", slow=0)
    built(str(STANDIN), tmp_path)  # what the killed one left is no obstacle
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "model.onnx"]


def test_trtexec_is_found_where_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRTEXEC", str(STANDIN))
    assert trtexec.find() == str(STANDIN)
    monkeypatch.setenv("TRTEXEC", str(tmp_path / "nothing"))
    with pytest.raises(Refusal, match="which is no program"):
        trtexec.find()
    monkeypatch.delenv("TRTEXEC")
    monkeypatch.setenv("PATH", f"{STANDIN.parent}{os.pathsep}{os.environ['PATH']}")
    assert trtexec.find() == str(STANDIN)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(trtexec, "_PLACES", (str(tmp_path / "trtexec"), str(STANDIN)))
    assert trtexec.find() == str(STANDIN)
    monkeypatch.setattr(trtexec, "_PLACES", ())
    assert trtexec.find() is None


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("error while loading shared libraries: libnvinfer.so.10", "not a working trtexec: .*libnvinfer"),
        ("", "not a working trtexec: it says nothing"),
    ],
)
def test_what_is_not_trtexec_is_refused(tmp_path: Path, says: str, message: str) -> None:
    tool = tmp_path / "trtexec"
    tool.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 127\n")
    tool.chmod(0o755)
    with pytest.raises(Refusal, match=message):
        trtexec.version(str(tool))


def test_a_version_that_is_too_old_is_refused(tmp_path: Path) -> None:
    tool = tmp_path / "trtexec"
    tool.write_text("#!/bin/sh\necho '&&&& RUNNING TensorRT.trtexec [TensorRT v8401] # trtexec'\n")
    tool.chmod(0o755)
    with pytest.raises(Refusal, match=r"TensorRT 8\.4\.1, which is too old"):
        built(str(tool), tmp_path)


@every_version
def test_the_stand_in_refuses_what_its_version_does_not_know(play: Callable[..., str], release: str) -> None:
    tool, here = play(release), VERSIONS[release]
    for flag, known in (
        ("--fp16", here < (11,)),
        ("--buildOnly", here < (10,)),
        ("--skipInference", here >= (8, 6)),
        ("--stronglyTyped", here >= (10,)),
        ("--noCudaGraph", here >= (11,)),
        ("--nonsense", False),
    ):
        result = subprocess.run([tool, "--loadEngine=nothing", flag], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert (f"[E] Unknown option: {flag}" in result.stderr) is not known
