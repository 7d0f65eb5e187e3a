"""Times of layers: ONNX Runtime's own, and TensorRT's through stand-ins for its Python API and for trtexec."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.nvidia import PRECISIONS, STANDINS, VERSIONS, graph, images, play, reference, request
from toolkit.agent import engine, ort, profiles, runner, trtexec

TRTEXEC_VERSIONS = ("8.5", "8.6", "10.3", "10.13", "10.16", "11.0", "11.1")


def built(folder: Path, precision: str = "fp32", **model: Any) -> dict[str, Any]:
    """Build an engine of ONNX Runtime."""
    path = graph(folder / "model.onnx", precision, **model)
    return engine.build(request(folder, path, precision, runtime="onnxruntime", threads=1))


# --- ONNX Runtime ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_node_that_onnx_runtime_runs_is_timed(tmp_path: Path, precision: str) -> None:
    description = built(tmp_path, precision)
    told = profiles.layers(str(tmp_path), description, None, images(3))
    optimised = onnx.load(tmp_path / description["file"]).graph.node
    assert sorted(layer["name"] for layer in told["layers"]) == sorted(node.name for node in optimised)
    assert {layer["type"] for layer in told["layers"]} == {node.op_type for node in optimised}
    assert all(layer["us"] >= 0 for layer in told["layers"])
    assert sum(layer["us"] for layer in told["layers"]) > 0
    assert told["ran"]["fallback"] == []
    assert sum(told["ran"]["precision"].values()) == 2
    assert told["notes"] == []


def test_nodes_that_were_put_in_or_fused_are_told_apart() -> None:
    assert profiles._exported("/network/fc/Gemm") == ["/network/fc/Gemm"]
    assert profiles._exported("/network/layer1/Relu_output_0_nchwc") == ["/network/layer1/Relu"]
    assert profiles._exported("ReorderOutput_token_54") == profiles._exported("ReorderInput") == []


def event(name: str, us: int, provider: str = "CPUExecutionProvider", kind: str = "Conv", index: int = 0) -> str:
    told = {"op_name": kind, "provider": provider, "node_index": str(index), "input_type_shape": [{"float16": [1]}]}
    line = {"cat": "Node", "name": name + "_kernel_time", "dur": us, "args": told}
    return str(line).replace("'", '"') + ",\n"


RUN = '{"cat": "Session", "name": "model_run", "dur": 1, "args": {}},\n'


def test_the_trace_is_read_by_query() -> None:
    """A node in a loop counts as often as it runs, and slow first queries do not count."""
    query = [event("a", 2), event("a", 3), event("", 7, "CUDAExecutionProvider", "Relu", 4), RUN]
    slow = [line.replace('"dur": ', '"dur": 9') for line in query]
    told = profiles._read_trace(iter(["[\n", *slow * 5, *query * 15, "]\n"]), "CPUExecutionProvider")
    assert told["layers"] == [
        {"name": "a", "type": "Conv", "us": 5, "nodes": ["a"]},
        {"name": "Relu 4", "type": "Relu", "us": 7, "nodes": ["Relu 4"]},
    ]
    assert told["ran"] == {"precision": {"fp16": 1}, "fallback": ["Relu"]}


def test_a_slow_engine_is_not_run_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "_SECONDS", 0)
    assert len(list(profiles._queries(images(3)))) == profiles._LEAST
    assert profiles.layers(str(tmp_path), built(tmp_path), None, images(3))["layers"]


def test_the_profile_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = built(tmp_path)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    session = ort.Session(str(tmp_path / description["file"]), 1, optimize=False)
    logits = session.run(images(2))
    assert profiles.layers(str(tmp_path), description, session, images(3))["layers"]
    np.testing.assert_array_equal(session.run(images(2)), logits)
    assert not list((tmp_path / "scratch").iterdir())


# --- TensorRT --------------------------------------------------------------------------------------------------


def loaded(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str, precision: str = "fp32") -> runner.Session:
    play(monkeypatch, version)
    engine.build(request(folder, graph(folder / "model.onnx", precision), precision))
    session = engine.load(str(folder), str(folder))
    assert isinstance(session, runner.Session)
    return session


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt_times_its_layers(
    version: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = loaded(tmp_path, monkeypatch, version, precision)
    logits = session.run(images(3))
    told = profiles.layers(str(tmp_path), engine.read(str(tmp_path), str(tmp_path)), session, images(3))
    rows = told["layers"]
    assert [row["us"] for row in rows] == pytest.approx([10.0 * (index + 1) for index in range(len(rows))])
    product = next(row for row in rows if "features.conv" in row["nodes"])
    assert product["type"] == "Conv"
    assert product["name"].endswith("features.conv + features.relu")
    known = ["features.conv", "features.relu"] if version.startswith("1") else ["features.conv"]
    assert product["nodes"] == known, "TensorRT 8 does not tell the nodes, whose names then stand in the layer's"
    assert told["ran"] is None
    assert told["notes"] == []
    np.testing.assert_array_equal(session.run(images(3)), logits)
    np.testing.assert_array_equal(logits, reference(tmp_path / "model.onnx", images(3)))
    session.close()


def test_no_memory_for_another_context_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = loaded(tmp_path, monkeypatch, "10.3")
    session.run(images(1))
    monkeypatch.setattr(sys.modules["tensorrt"].ICudaEngine, "create_execution_context", lambda self: None)
    told = profiles.layers(str(tmp_path), engine.read(str(tmp_path), str(tmp_path)), session, images(3))
    assert told == {
        "layers": None,
        "ran": None,
        "notes": ["the layers were not timed: no execution context for the engine: it gave no reason"],
    }
    assert session.run(images(1)).shape == (1, 10)


# --- trtexec ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["batch", 1], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("version", TRTEXEC_VERSIONS)
def test_trtexec_times_the_layers(
    version: str, batch: str | int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.setenv("TRTEXEC_STANDIN", version)
    monkeypatch.setenv("TRTEXEC", str(STANDINS / "trtexec"))
    asked = request(tmp_path, graph(tmp_path / "model.onnx", batch=batch))
    if batch == 1:
        asked["batches"] = None
    trtexec.build(str(STANDINS / "trtexec"), asked, workspace=None, cache=None, out=str(tmp_path / "engine"))
    description = asked | {"file": "engine"}
    told = profiles.layers(str(tmp_path), description, None, images(1))
    rows = {row["name"]: row for row in told["layers"]}
    assert [row["us"] for row in rows.values()] == pytest.approx([500 / len(rows)] * len(rows))
    assert rows["features.conv"] == rows["features.conv"] | {"type": "CaskConvolution", "nodes": ["features.conv"]}


def test_without_trtexec_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trtexec, "find", lambda: None)
    description = {"runtime": "tensorrt", "file": "engine"}
    told = profiles.layers(str(tmp_path), description, None, images(1))
    assert told["layers"] is None
    assert told["notes"] == ["the layers were not timed: there is no trtexec"]
