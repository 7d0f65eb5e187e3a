"""The runner, with stand-ins for TensorRT and for CUDA's two Python libraries; ONNX Runtime knows the answers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.nvidia import (
    A100,
    ORIN,
    PRECISIONS,
    VERSIONS,
    environment,
    graph,
    images,
    play,
    reference,
    request,
)
from toolkit.agent import cuda, engine, facts, runner
from toolkit.agent.protocol import Refusal
from toolkit.devices.agent import Agent
from toolkit.devices.local import LocalDevice
from toolkit.errors import StageError

Load = Callable[..., runner.Session]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Build an engine on a device with TensorRT, and load it there."""

    def build_and_load(
        version: str = "10.3", precision: str = "fp32", library: str = "cuda_python", **model: Any
    ) -> runner.Session:
        play(monkeypatch, version, library=library)
        batches = None if "batch" in model else {"min": 1, "opt": 4, "max": 8}
        path = graph(tmp_path / "model.onnx", precision, **model)
        engine.build(request(tmp_path, path, precision, batches=batches))
        session = engine.load(str(tmp_path), str(tmp_path))
        assert isinstance(session, runner.Session)
        return session

    return build_and_load


@pytest.mark.parametrize("library", ["cuda_python", "pycuda"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("version", VERSIONS)
def test_it_computes_what_onnx_runtime_computes(
    version: str, precision: str, library: str, load: Load, tmp_path: Path
) -> None:
    session = load(version, precision, library)
    for count in (1, 3, session.max_batch, 1):
        batch = images(count)
        for _ in range(2):  # the first time as TensorRT does it, then perhaps as a CUDA graph
            np.testing.assert_array_equal(session.run(batch), reference(tmp_path / "model.onnx", batch))
    assert session.max_batch == 8
    assert session.settings == {
        "cuda": {"cuda_python": "cuda-python", "pycuda": "pycuda"}[library],
        "cuda_graph": library == "cuda_python",
        "data_transfers": True,
    }
    assert session.layers["checked"] == 2
    session.close()


@pytest.mark.parametrize("output", ["fp16", "fp32"])
def test_logits_keep_their_type(output: str, load: Load, tmp_path: Path) -> None:
    session = load(precision="fp16", output=output)
    logits = session.run(images(3))
    assert logits.dtype == {"fp16": np.float16, "fp32": np.float32}[output]
    assert logits.shape == (3, 10)
    np.testing.assert_array_equal(logits, reference(tmp_path / "model.onnx", images(3)))


def test_a_fixed_batch(load: Load, tmp_path: Path) -> None:
    session = load(batch=2)
    assert session.max_batch == 2
    np.testing.assert_array_equal(session.run(images(2)), reference(tmp_path / "model.onnx", images(2)))


def test_results_are_not_overwritten_by_the_next_run(load: Load) -> None:
    session = load()
    first = session.run(images(3))
    kept = first.copy()
    session.run(images(3)[::-1])
    np.testing.assert_array_equal(first, kept)


def test_a_prepared_query_copies_its_images_each_time(load: Load, tmp_path: Path) -> None:
    session = load()
    batch = images(3)
    query, other = session.prepare(batch), session.prepare(images(1))
    for _ in range(2):
        np.testing.assert_array_equal(query(), reference(tmp_path / "model.onnx", images(3)))
        np.testing.assert_array_equal(other(), reference(tmp_path / "model.onnx", images(1)))
    batch[:] = batch[::-1].copy()
    np.testing.assert_array_equal(query(), reference(tmp_path / "model.onnx", images(3)[::-1]))
    session.close()


def test_a_cuda_graph_replays_what_was_captured(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load()
    session.run(images(3))
    enqueue = sys.modules["tensorrt"].IExecutionContext
    monkeypatch.setattr(enqueue, "execute_async_v3", lambda self, stream: pytest.fail("TensorRT was called again"))
    session.run(images(3))
    with pytest.raises(pytest.fail.Exception, match="called again"):
        session.run(images(4))


def test_without_a_graph_it_runs_all_the_same(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load()
    from cuda.bindings import runtime

    def of_cuda_11(graph: object, error_node: object, log: object, size: int) -> None:
        """As in the bindings for CUDA 11."""

    monkeypatch.setattr(runtime, "cudaGraphInstantiate", of_cuda_11)
    for _ in range(2):
        np.testing.assert_array_equal(session.run(images(3)), reference(tmp_path / "model.onnx", images(3)))
    assert session.settings["cuda_graph"] is False


def test_a_call_that_no_capture_may_hold_leaves_no_graph(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load()
    from cuda.bindings import runtime

    assert session._cuda.capture(lambda: runtime.cudaMalloc(16)) is None
    assert session._cuda.capture(session._cuda.synchronize) is None
    assert session._cuda.capture(lambda: None) is not None, "the stream can be captured again"


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("TENSORRT_STANDIN", "10.16", r"does not load: .*expecting library version 10\.16\.1\.11 got 10\.3\.0\.30"),
        ("TENSORRT_STANDIN_GPU", "Tesla T4, sm_75", r"does not load: .*expecting compute 7\.5 got compute 8\.0"),
    ],
)
def test_what_only_tensorrt_notices_is_told(
    setting: str, value: str, message: str, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    description = json.loads((tmp_path / "engine.json").read_text())
    if setting == "TENSORRT_STANDIN":
        play(monkeypatch, value)
    else:
        name, capability = value.split(", ")
        play(monkeypatch, gpu={"name": name, "compute_capability": capability})
    with pytest.raises(Refusal, match=message):
        runner.Session(str(tmp_path / "model.engine"), description, str(tmp_path))


def test_a_batch_that_the_profile_does_not_hold_is_refused(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch)
    path = graph(tmp_path / "model.onnx")
    engine.build(request(tmp_path, path, batches={"min": 2, "opt": 4, "max": 8}))
    session = engine.load(str(tmp_path), str(tmp_path))
    with pytest.raises(Refusal, match="does not satisfy any optimization profiles"):
        session.run(images(1))


def test_no_memory_for_a_context_is_said(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load()

    def create_execution_context(plan: Any) -> None:
        plan._logger.log(plan._logger.Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 1 bytes.)")

    monkeypatch.setattr(sys.modules["tensorrt"].ICudaEngine, "create_execution_context", create_execution_context)
    with pytest.raises(Refusal, match="no execution context for the engine: out of memory"):
        session.run(images(1))


@pytest.mark.parametrize("library", ["cuda_python", "pycuda"])
def test_what_cuda_refuses_is_said(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, library=library)
    working = cuda.start()
    with working, pytest.raises(Refusal, match=r"the GPU has not enough memory: .*[mM]emory") as error:
        working.allocate(1 << 40)
    assert "stop what else runs" in str(error.value.hint)
    with working:
        small = working.allocate(16)
    with working, pytest.raises(Refusal, match=r"CUDA does not work here: .*[iI]nvalid"):
        working.to_gpu(small, working.pinned(17))
    with working, pytest.raises(Refusal, match=r"CUDA does not work here: .*[iI]nvalid"):
        working.to_host(working.pinned(16), small + 1)


def test_without_cuda_for_python_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, library=None)
    assert not cuda.available()
    with pytest.raises(Refusal, match="neither cuda-python nor pycuda") as error:
        cuda.start()
    assert "pip install cuda-python" in str(error.value.hint)


@pytest.mark.skipif(not util.find_spec("cuda"), reason="cuda-python is not installed")
@pytest.mark.skipif(bool(facts.gpus()), reason="there is a GPU")
def test_the_real_cuda_python_without_a_driver_is_a_refusal() -> None:
    with pytest.raises(Refusal, match="CUDA does not work here: cudaError") as error:
        cuda.CudaPython()
    assert "nvidia-smi" in str(error.value.hint)


# the whole of it, as a device sees it: a zipapp, its Python, nvidia-smi


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalDevice:
    """An A100 with TensorRT 10.3 and cuda-python, which the agent finds out for itself."""
    distribution = tmp_path / "site" / "tensorrt-10.3.0.dist-info"
    distribution.mkdir(parents=True)
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 10.3.0\n")
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{A100['name']}, 8.0, 40960'\n")
    tool.chmod(0o755)
    for name, value in environment("10.3", A100, "tensorrt_api", "cuda_python").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    return LocalDevice(tmp_path / "device")


def test_the_agent_builds_and_measures(device: LocalDevice, tmp_path: Path) -> None:
    agent = Agent(device)
    told = agent.ask("facts", {"root": device.root})
    assert (told["runtimes"]["tensorrt"], told["gpus"][0]["compute_capability"]) == ("10.3.0", "sm_80")
    release = tmp_path / "release"
    release.mkdir()
    model = graph(tmp_path / "model.onnx", "fp16")
    built = agent.ask("build", request(release, model, "fp16") | {"root": device.root})
    assert built["fingerprint"]["version"] == "10.3.0.30"

    (release / "evaluation").mkdir()
    data = images(50)
    answers = reference(model, data)
    np.save(release / "evaluation" / "images.npy", data)
    np.save(release / "evaluation" / "labels.npy", answers.argmax(1))
    order = {
        "root": device.root,
        "release": str(release),
        "out": str(tmp_path / "out"),
        "warmup_ms": 1,
        "scenarios": [
            {"name": "SingleStream", "duration_ms": 20, "queries": 30},
            *({"name": "Offline", "batch": batch, "duration_ms": 20} for batch in (1, 8, 64)),
        ],
        "evaluate": True,
        "profile": False,
        "tuning": {"power_mode": None, "clocks": None, "sudo": False},
    }
    measured = agent.ask("bench", order)
    assert [entry["batch"] for entry in measured["scenarios"]] == [1, 1, 8]
    assert measured["not_measured"] == {"Offline-64": "the engine takes batches of 8 at most"}
    assert measured["conditions"]["affinity"] is None, "the GPU computes"
    assert measured["ran"] == {
        "provider": "TensorRT 10.3.0.30",
        "threads": None,
        "precision": {"fp16": 2},
        "fallback": [],
    }
    assert measured["settings"]["cuda_graph"] is True
    assert measured["provider"] == "TensorRT 10.3.0.30"
    assert measured["layers"] == built["layers"] == {"checked": 2, "unknown": [], "other": {}}
    np.testing.assert_allclose(np.load(tmp_path / "out" / "logits.npy"), answers, atol=1e-3)
    assert len(np.load(tmp_path / "out" / "SingleStream.npy")) >= 30
    compared = agent.ask(
        "compare", order | {"releases": [str(release)] * 2, "duration_ms": 50, "period_ms": None, "seed": 2}
    )
    assert min(compared["queries"]) >= 5

    description = json.loads((release / "engine.json").read_text())
    description["fingerprint"]["gpu"] = ORIN["name"]
    (release / "engine.json").write_text(json.dumps(description))
    with pytest.raises(StageError, match=f"built on {ORIN['name']}, the device has {A100['name']}"):
        agent.ask("bench", order)
