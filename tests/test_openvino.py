"""OpenVINO for real: engines built, loaded and refused through the agent; ONNX Runtime knows the answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from pydantic import ValidationError

from tests.conftest import job_of, run_toolkit
from tests.nvidia import graph, images, reference, request
from tests.test_doctor import COMMON, parse
from toolkit import doctor, engines, files, pipeline
from toolkit.agent import engine, facts, ov
from toolkit.agent.protocol import Refusal
from toolkit.config import Target
from toolkit.console import Console
from toolkit.delivery import provision
from toolkit.devices.agent import Agent
from toolkit.devices.local import LocalDevice
from toolkit.engines import places
from toolkit.errors import StageError
from toolkit.job import Job
from toolkit.report import terminal
from toolkit.report.document import SCHEMA
from toolkit.stages import Runner
from toolkit.store import Store

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install -e '.[openvino]'")

CPU = Target(name="a-cpu", profile="tiny", runtime="openvino", root="/releases")
CAPABILITIES = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

Asked = Callable[..., dict[str, Any]]


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    """A build request for a small graph."""

    def ask(precision: str = "fp32", batch: int | str = "batch", **changes: Any) -> dict[str, Any]:
        path = graph(tmp_path / "model.onnx", precision, batch=batch)
        values: dict[str, Any] = {"runtime": "openvino", "threads": 1}
        if batch != "batch":
            values["batches"] = None
        return request(tmp_path, path, precision, **values | changes)

    return ask


def apart(session: ov.Session, model: Path, batch: np.ndarray) -> float:
    return float(np.abs(session.run(batch) - reference(model, batch)).max())


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("int8", 0.1)])
def test_it_computes_what_onnx_runtime_computes(
    asked: Asked, tmp_path: Path, precision: str, tolerance: float
) -> None:
    built = Agent(LocalDevice(tmp_path / "root")).ask("build", asked(precision))
    assert built == json.loads((tmp_path / "engine.json").read_text())
    session = engine.load(str(tmp_path), str(tmp_path))
    for count in (4, 1, 9, 4):  # four is what it is tuned for
        assert apart(session, tmp_path / "model.onnx", images(count)) < tolerance
    assert session.settings == {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    assert session.settings == built["settings"]
    assert session.layers["checked"] == {"fp32": 1, "int8": 2}[precision]
    assert session.layers["other"] == {}
    assert session.max_batch > 1000


def test_a_fixed_batch(asked: Asked, tmp_path: Path) -> None:
    engine.build(asked(batch=2))
    session = engine.load(str(tmp_path), str(tmp_path))
    assert session.max_batch == 2
    assert apart(session, tmp_path / "model.onnx", images(2)) < 1e-5


def test_prepared_queries_keep_their_images(asked: Asked, tmp_path: Path) -> None:
    engine.build(asked())
    session = engine.load(str(tmp_path), str(tmp_path))
    batches = [images(4), images(4)[::-1].copy(), images(3)]
    expected = [reference(tmp_path / "model.onnx", batch) for batch in batches]
    queries = [session.prepare(batch) for batch in batches]
    for batch in batches:
        batch[:] = 0
    for index in (0, 1, 2, 1, 0):
        np.testing.assert_allclose(queries[index](), expected[index], atol=1e-5)


def test_results_are_not_overwritten_by_the_next_run(asked: Asked, tmp_path: Path) -> None:
    engine.build(asked())
    session = engine.load(str(tmp_path), str(tmp_path))
    first = session.run(images(4))
    kept = first.copy()
    session.run(images(4)[::-1])
    np.testing.assert_array_equal(first, kept)


@pytest.mark.skipif("FP16" in CAPABILITIES, reason="this CPU computes in fp16")
def test_a_precision_that_the_cpu_lacks_is_refused(asked: Asked) -> None:
    with pytest.raises(
        Refusal, match=r"asked OpenVINO for INFERENCE_PRECISION_HINT f16 and got (f32|bf16)"
    ) as error:
        engine.build(asked("fp16"))
    assert "--precision fp32" in str(error.value.hint)


@pytest.mark.skipif("BF16" not in CAPABILITIES, reason="this CPU does not compute in bf16")
def test_layers_in_another_precision_are_named(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ov._ELSE, "fp32", "bf16")
    with pytest.raises(Refusal, match=r"1 of 1 layers .*: features\.conv \(bf16 instead of fp32\)"):
        engine.build(asked())


def test_an_int8_graph_that_runs_in_fp32_is_refused(asked: Asked) -> None:
    with pytest.raises(Refusal, match=r"features\.conv \(fp32 instead of int8\)"):
        engine.build(asked(expected={"features.conv": "int8"}))


def test_threads_that_it_does_not_get_are_refused(asked: Asked) -> None:
    many = facts.collect({"root": "/"})["cores"] + 1
    with pytest.raises(Refusal, match=f"INFERENCE_NUM_THREADS {many} and got {many - 1}") as error:
        engine.build(asked(threads=many))
    assert "threads in the target file" in str(error.value.hint)


def test_an_operator_that_it_lacks_is_named(asked: Asked, tmp_path: Path) -> None:
    wrong = asked()
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.node[-1].op_type = "MadeUp"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(Refusal, match=r"OpenVINO does not take the graph: .*MadeUp"):
        engine.build(wrong)


def test_without_openvino_the_remedy_is_told(asked: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(Refusal, match="OpenVINO cannot be imported") as refusal:
        engine.build(asked())
    assert "toolkit provision" in str(refusal.value.hint)
    monkeypatch.setattr(facts, "runtimes", dict)
    with pytest.raises(StageError, match="OpenVINO is not installed on this machine") as error:
        places.choose(CPU, tmp_path)
    assert error.value.hint == "python3 -m pip install openvino"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cpu", "another", "built for another, the device has"),
        ("arch", "aarch64", "built for aarch64, the device has"),
        ("version", "2025.0.0", "built with OpenVINO 2025.0.0, the device has 20"),
    ],
)
def test_an_engine_of_another_machine_is_refused(
    asked: Asked, tmp_path: Path, key: str, value: str, message: str
) -> None:
    built = engine.build(asked())
    built["fingerprint"][key] = value
    (tmp_path / "engine.json").write_text(json.dumps(built))
    with pytest.raises(Refusal, match=f"the engine does not fit: {message}") as error:
        engine.load(str(tmp_path), str(tmp_path))
    assert "rebuild it" in str(error.value.hint)


def test_a_damaged_engine_is_refused(asked: Asked, tmp_path: Path) -> None:
    path = tmp_path / engine.build(asked())["file"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Refusal, match=r"the engine model\.openvino\.onnx is damaged"):
        engine.load(str(tmp_path), str(tmp_path))


def test_each_layer_is_timed(asked: Asked, tmp_path: Path) -> None:
    path = graph(tmp_path / "large.onnx", size=64)
    built = engine.build(asked(onnx=str(path), input={"name": "images", "shape": [3, 64, 64]}))
    random = np.random.default_rng(0)
    queries = [random.integers(0, 256, (4, 3, 64, 64), np.uint8) for _ in range(20)]
    layers = ov.profile(str(tmp_path / built["file"]), built, queries)
    (convolution,) = (layer for layer in layers if "features.conv" in layer["nodes"])
    assert convolution["type"] == "Convolution"
    assert 5 < convolution["us"] < 1e5
    assert all(layer["us"] >= 0 for layer in layers)


# --- the host's side -----------------------------------------------------------------------------------------


def test_it_takes_the_spelling_that_it_is_faster_with() -> None:
    assert engines.spelling(CPU) == "onnxruntime"


def test_a_device_that_lacks_it_is_told_what_to_do() -> None:
    board = COMMON + "arch=aarch64\nprocessor=\nflags=fp\nmemory_kb=4000000\npython=3.11.2\nend=yes\n"
    there = CPU.at("board")
    (failed,) = (check for check in doctor.judge(parse(board), there, "/releases") if check.name == "runtime")
    assert (failed.status, failed.text) == ("fail", "OpenVINO is not installed there")
    assert failed.hint == "toolkit provision a-cpu --host board"
    assert provision.needs(there, parse(board), "board") == {"numpy": "", "pillow": "", "openvino": ">=2025.0"}
    (passed,) = (
        check
        for check in doctor.judge(parse(board.replace("end=", "package=openvino 2026.4.1\nend=")), there, "/r")
        if check.name == "runtime"
    )
    assert passed.text == "OpenVINO 2026.4.1"


def test_any_target_of_a_cpu_can_use_it() -> None:
    chosen = files.load_target("host-cpu").using("openvino")
    assert (chosen.runtime, chosen.where, chosen.on_cpu) == ("openvino", "device", True)


BOTH = "description: a small job\nprofile: tiny\nruntime: onnxruntime\nalternatives: [openvino]\n"


def test_a_target_with_an_alternative_ships_the_faster_engine(finished_copy: Path) -> None:
    (finished_copy / "targets" / "tiny.yaml").write_text(BOTH)
    plan = json.loads(run_toolkit(finished_copy, "plan", "tiny", "--precision", "int8", "--json").stdout)
    assert [stage["name"] for stage in plan["stages"] if not stage["cached"]] == [
        "build",
        "push",
        "bench",
        "report",
    ]
    result = run_toolkit(finished_copy, "run", "tiny", "--precision", "int8")
    assert result.returncode == 0, result.stderr
    newest = max((finished_copy / "build" / "runs").glob("*/run.json"))
    recorded = json.loads(newest.read_text())
    jsonschema.validate(recorded, json.loads(SCHEMA.read_text()))
    medians = {name: p50["value"] for name, p50 in recorded["engine"]["runtimes"].items()}
    assert set(medians) == {"onnxruntime", "openvino"}
    fastest = min(medians, key=lambda name: medians[name])
    assert recorded["engine"]["runtime"] == recorded["engine"]["fingerprint"]["runtime"] == fastest
    assert recorded["bench"]["latency_ms"]["p50"]["value"] == medians[fastest]
    current = finished_copy / "build" / "devices" / "tiny" / "current"
    assert json.loads((current / "engine.json").read_text())["runtime"] == fastest
    said = f"faster here than {'ONNX Runtime' if fastest == 'openvino' else 'OpenVINO'} (p50 "
    assert said in result.stdout
    assert said in newest.with_name("report.html").read_text()
    assert said in newest.with_name("report.md").read_text()
    again = json.loads(run_toolkit(finished_copy, "run", "tiny", "--precision", "int8", "--json").stdout)
    assert all(stage["cached"] for stage in again["stages"])
    assert again["engine"] == recorded["engine"]
    alone = ("bench", "tiny", "--precision", "int8", "--runtime", "onnxruntime", "--json")
    pinned = json.loads(run_toolkit(finished_copy, *alone).stdout)
    assert list(pinned["engine"]["runtimes"]) == [pinned["engine"]["runtime"]] == ["onnxruntime"]


def chosen(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    medians: tuple[float | None, float],
    statuses: tuple[str, str] = ("passed", "passed"),
    installed: Sequence[str] = ("onnxruntime", "openvino"),
    problem: str | None = None,
) -> tuple[str, Runner]:
    """Return which runtime is taken when both, ONNX Runtime first, measure so, and the runner."""
    p50 = dict(zip(("onnxruntime", "openvino"), medians, strict=True))
    status = dict(zip(("onnxruntime", "openvino"), statuses, strict=True))
    device = SimpleNamespace(facts=lambda: {"runtimes": dict.fromkeys(installed, "1.0")}, name="the board")

    def bring(job: Job, stages: Runner, made: Any) -> Any:
        return SimpleNamespace(device=device, runtime=job.target.runtime)

    def measure(job: Job, stages: Runner, there: Any) -> Any:
        if problem and there.runtime == "openvino":
            raise StageError(problem)
        return SimpleNamespace(meta={"latency_ms": {"p50": {"value": p50[there.runtime]}}})

    def judge(job: Job, there: Any, bench: Any) -> Any:
        return SimpleNamespace(status=status[there.runtime])

    monkeypatch.setattr(pipeline, "bring", bring)
    monkeypatch.setattr(pipeline.measurement, "measure", measure)
    monkeypatch.setattr(pipeline.measurement, "judge", judge)
    stages = Runner(Store(folder), Console(), "commit")
    networks: Any = None
    there: Any = pipeline.fastest(job_of(folder), stages, networks)[0]
    return there.runtime, stages


@pytest.mark.parametrize(
    ("medians", "statuses", "taken"),
    [
        ((2.0, 1.0), ("passed", "passed"), "openvino"),
        ((1.0, 2.0), ("passed", "passed"), "onnxruntime"),
        ((1.0, 1.0), ("passed", "passed"), "onnxruntime"),
        ((2.0, 1.0), ("passed", "failed"), "onnxruntime"),
        ((1.0, 2.0), ("failed", "undecided"), "openvino"),
        ((2.0, 1.0), ("failed", "failed"), "openvino"),
        ((None, 1.0), ("passed", "passed"), "openvino"),
    ],
)
def test_an_engine_that_breaks_the_contract_is_no_faster_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    medians: tuple[float | None, float],
    statuses: tuple[str, str],
    taken: str,
) -> None:
    runtime, stages = chosen(tmp_path, monkeypatch, medians, statuses)
    assert runtime == taken
    assert stages.runtimes == {"onnxruntime": {"value": medians[0]}, "openvino": {"value": medians[1]}}


@pytest.mark.parametrize(
    ("runtime", "medians", "said"),
    [
        ("openvino", {"onnxruntime": 2.0, "openvino": 1.0},
         "OpenVINO (p50 1.000 ms), faster here than ONNX Runtime (p50 2.000 ms)"),
        ("onnxruntime", {"onnxruntime": 2.0, "openvino": 1.0},
         "ONNX Runtime (p50 2.000 ms), since the contract is broken by OpenVINO (p50 1.000 ms)"),
        ("openvino", {"onnxruntime": None, "openvino": 1.0},
         "OpenVINO (p50 1.000 ms), faster here than ONNX Runtime (p50 not measured)"),
        ("openvino", {"openvino": 1.0}, ""),
    ],
)  # fmt: skip
def test_what_is_said_of_runtimes(runtime: str, medians: dict[str, float | None], said: str) -> None:
    engine = {"runtime": runtime, "runtimes": {name: {"value": value} for name, value in medians.items()}}
    assert terminal.runtimes({"engine": engine}) == said


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"installed": ["onnxruntime"]}, "it is not installed on the board"),
        ({"problem": "there is no fp16 here"}, "there is no fp16 here"),
    ],
)
def test_an_alternative_that_cannot_be_measured_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    why: str,
) -> None:
    runtime, stages = chosen(tmp_path, monkeypatch, (2.0, 1.0), **changes)
    assert (runtime, list(stages.runtimes)) == ("onnxruntime", ["onnxruntime"])
    assert f"OpenVINO is not measured: {why}" in capsys.readouterr().err


def test_a_device_gets_the_alternatives_too() -> None:
    there = files.load_target("host-cpu").at("board")
    board = COMMON + "arch=aarch64\nprocessor=\nflags=fp\nmemory_kb=4000000\npython=3.11.2\nend=yes\n"
    wanted = provision.needs(there, parse(board), "board")
    assert wanted == {"numpy": "", "pillow": "", "onnxruntime": "", "openvino": ">=2025.0"}
    (check,) = (check for check in doctor.judge(parse(board), there, "/releases") if check.name == "alternative")
    assert (check.status, check.text) == ("warn", "OpenVINO is not installed there")
    assert check.hint == "toolkit provision host-cpu --host board"


@pytest.mark.parametrize(
    ("name", "alternatives", "message"),
    [
        ("host-cpu", ["onnxruntime"], "onnxruntime is the runtime already"),
        ("host-cpu", ["tensorrt"], "Input should be 'onnxruntime' or 'openvino'"),
        ("jetson-orin", ["openvino"], "alternatives are runtimes of the CPU"),
    ],
)
def test_alternatives_that_are_none(name: str, alternatives: list[str], message: str) -> None:
    values = files.load_target(name).model_dump()
    with pytest.raises(ValidationError, match=message):
        Target(**values | {"alternatives": alternatives})


def test_the_whole_job(finished_copy: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    asked = ("run", "tiny", "--runtime", "openvino", "--precision", "int8", "--json")
    result = run_toolkit(finished_copy, *asked)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["artifacts"]["quantize"] == finished[1]["artifacts"]["quantize"]
    assert document["engine"]["fingerprint"]["runtime"] == "openvino"
    bench = document["bench"]
    assert bench["provider"] == "OpenVINO CPU"
    assert bench["settings"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert bench["layers"]["other"] == {}
    assert bench["accuracy"] == pytest.approx(finished[1]["bench"]["accuracy"], abs=0.03)
    again = json.loads(run_toolkit(finished_copy, *asked).stdout)
    assert [stage["cached"] for stage in again["stages"] if stage["name"] in ("build", "bench")] == [True, True]
