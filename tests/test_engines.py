"""Engines as the host orders them; TensorRT for RTX builds real ones here, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests.conftest import run_toolkit
from toolkit import engines, export, graphs, pipeline
from toolkit.agent import trt
from toolkit.compression import calibration, models, quantization
from toolkit.compression.spelling import spell
from toolkit.config import Precision, Target
from toolkit.console import Console
from toolkit.devices import Device
from toolkit.devices.local import LocalDevice
from toolkit.engines import Order, places
from toolkit.errors import StageError, UsageError
from toolkit.stages import Runner
from toolkit.store import Artifact, Store, Work
from toolkit.workload import Model

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install -e '.[rtx]'")

NEW_GPUS = ["sm_80", "sm_86", "sm_89", "sm_120"]


def target(*capabilities: str, **more: Any) -> Target:
    values = {
        "name": "a-gpu",
        "profile": "tiny",
        "arch": "x86_64",
        "compute_capability": capabilities[0],
        "runtime": "tensorrt-rtx",
        "build": {"compute_capabilities": list(capabilities)},
    }
    return Target.model_validate(values | more)


def order(precision: Precision, size: int, *capabilities: str) -> Order:
    shape = {"name": "images", "shape": [3, size, size]}
    return Order(target(*capabilities), precision, shape, {"min": 1, "opt": 1, "max": 8})


def artifact(path: Path) -> Artifact:
    """A graph as an artifact: what ``engines.build`` takes."""
    return Artifact("quantize", "key", path.parent, f"{hash(path):032x}", {}, {}, False, 0.0, "")


@pytest.fixture(scope="module")
def pruned(finished: tuple[Path, dict[str, Any]]) -> Path:
    """The pruned ResNet20 of a finished job, exported: fp32."""
    folder, document = finished
    found = Store(folder / "build" / "store").lookup("export", document["artifacts"]["export"])
    assert found
    return found.file("model.onnx")


def torchvision(name: str, folder: Path) -> Path:
    """A torchvision network as the toolkit exports it, with images of 64 pixels."""
    network = models.build(Model.parse(f"torchvision:{name}"), 10, seed=0).eval()
    wrapped = export._WithPreprocessing(network, [0.5] * 3, [0.25] * 3).eval()
    batch = {0: "batch"}
    torch.onnx.export(
        wrapped,
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8),),
        str(folder / "model.onnx"),
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": batch, "logits": batch},
        opset_version=export.OPSET,
        dynamo=False,
    )
    assert isinstance(network, nn.Module)
    return folder / "model.onnx"


def spelled(source: Path, precision: Precision, folder: Path, size: int) -> Path:
    """The graph in a precision, as TensorRT takes it."""
    path = folder / f"{precision}.onnx"
    if precision == "fp16":
        onnx.save(quantization._to_fp16(onnx.load(source)), path)
    elif precision != "fp32":
        images = np.random.default_rng(0).integers(0, 256, (32, 3, size, size), np.uint8)
        model = calibration.prepare(source)
        onnx.save(spell(model, calibration.calibrate(model, images, 32)["minmax"], "tensorrt", precision), path)
    else:
        path.write_bytes(source.read_bytes())
    (folder / "graph").mkdir(exist_ok=True)
    return path.rename(folder / "graph" / "model.onnx")


def build(graph: Path, asked: Order, folder: Path) -> dict[str, Any]:
    out = folder / "out"
    out.mkdir()
    device = LocalDevice(folder / "builder")
    return engines.build(Work(out, folder), artifact(graph), asked, device, folder / "timing")


@pytest.mark.parametrize(
    ("precision", "capabilities"),
    [
        ("fp16", ["sm_75"]),
        ("fp16", NEW_GPUS),
        ("fp32", NEW_GPUS),
        ("int8", NEW_GPUS),
        ("fp8", ["sm_89", "sm_120"]),
        *[(precision, [capability]) for precision in ("fp16", "int8") for capability in NEW_GPUS],
    ],
)
def test_a_pruned_resnet20(pruned: Path, tmp_path: Path, precision: Precision, capabilities: list[str]) -> None:
    graph = spelled(pruned, precision, tmp_path, 16)
    assert set(graphs.precisions(graph).values()) == {precision}
    built = build(graph, order(precision, 16, *capabilities), tmp_path)
    plan = (tmp_path / "out" / "model.engine").read_bytes()
    assert len(plan) == built["bytes"] > 100_000
    assert built["fingerprint"]["compute_capability"] == capabilities
    assert built["fingerprint"]["version"] == trt.plan_version(plan)
    assert json.loads((tmp_path / "out" / "engine.json").read_text())["sha256"] == built["sha256"]
    assert not (tmp_path / "builder" / "building").exists() or not list(
        (tmp_path / "builder" / "building").iterdir()
    )


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_torchvision_networks(tmp_path: Path, name: str) -> None:
    source = torchvision(name, tmp_path)
    asked: tuple[tuple[Precision, list[str]], ...] = (
        ("fp16", ["sm_75"]), ("fp16", NEW_GPUS), ("int8", NEW_GPUS)
    )  # fmt: skip
    for number, (precision, capabilities) in enumerate(asked):
        folder = tmp_path / str(number)
        folder.mkdir()
        graph = spelled(source, precision, folder, 64)
        assert set(graphs.precisions(graph).values()) == {precision}
        assert build(graph, order(precision, 64, *capabilities), folder)["bytes"] > 1_000_000


def test_an_operator_that_the_runtime_lacks_is_named(tmp_path: Path) -> None:
    node = onnx.helper.make_node("MadeUp", ["images"], ["logits"], name="/head/MadeUp", domain="com.example")
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.example", 1)]
    graph = onnx.helper.make_graph([node], "graph", [images], [logits])
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets), tmp_path / "model.onnx")
    with pytest.raises(StageError, match="MadeUp") as error:
        build(tmp_path / "model.onnx", order("fp16", 8, "sm_80"), tmp_path)
    assert "/head/MadeUp" in error.value.message
    assert error.value.hint


def test_turing_is_built_for_alone_and_in_fp16() -> None:
    with pytest.raises(UsageError, match=r"Turing \(sm_75\) in fp16, not in int8"):
        engines.require_precision(target("sm_75"), "int8")
    with pytest.raises(UsageError, match="alone, not together with sm_80"):
        engines.require_precision(target("sm_75", "sm_80"), "fp16")
    engines.require_precision(target("sm_75"), "fp16")


def test_fp8_begins_with_ada() -> None:
    engines.require_precision(target("sm_89", "sm_120"), "fp8")
    engines.require_precision(target("sm_110", runtime="tensorrt", arch="aarch64", build={}), "fp8")
    with pytest.raises(UsageError, match="sm_80, sm_86 has no fp8, which begins with sm_89") as error:
        engines.require_precision(target(*NEW_GPUS), "fp8")
    assert error.value.hint == "--precision int8 or fp16"
    on_cpu = target("sm_80").model_copy(update={"runtime": "openvino"})
    with pytest.raises(UsageError, match="openvino does not compute in fp8 on a CPU"):
        engines.require_precision(on_cpu, "fp8")


@pytest.mark.parametrize(("name", "capability"), [("a100", "sm_80"), ("t4", "sm_75")])
def test_the_whole_job_ahead_of_time(finished_copy: Path, name: str, capability: str) -> None:
    asked = ("run", name, "--runtime", "tensorrt-rtx", "--profile", "tiny", "--precision", "fp16", "--json")
    result = run_toolkit(finished_copy, *asked)
    assert result.returncode == 1
    document = json.loads(result.stdout)
    assert document["stages"][-1]["name"] == "build"
    assert document["engine"]["fingerprint"]["compute_capability"] == [capability]
    assert f"push, bench and commit need the device ({capability})" in document["error"]["message"]
    assert f"warning: the run will end before 'push': push, bench and commit need the device ({capability})" in (
        result.stderr
    )
    assert "not done: push, bench, report; the rest is kept" in result.stderr
    engine = finished_copy / "build" / "store" / "build" / document["artifacts"]["build"] / "model.engine"
    assert trt.plan_version(engine.read_bytes()) == document["engine"]["fingerprint"]["version"]
    planned = run_toolkit(finished_copy, "plan", *asked[1:-1])
    assert "TensorRT for RTX needs no GPU to build" in planned.stdout
    assert "agents/" in planned.stdout


# --- where an engine is built ------------------------------------------------------------------------------


def facts(**more: Any) -> dict[str, Any]:
    """What an agent says of a Jetson AGX Orin as NVIDIA sets it up."""
    orin = {"name": "Orin", "compute_capability": "sm_87", "memory_bytes": 64 << 30}
    plain = {
        "arch": "aarch64", "gpus": [orin], "l4t": "36.4.3", "jetpack": "6.2", "power_mode": "MAXN",
        "runtimes": {"tensorrt": "10.3.0.30"}, "container": None,
    }  # fmt: skip
    return plain | more


JETSON = Target(
    name="an-orin", profile="tiny", arch="aarch64", compute_capability="sm_87", runtime="tensorrt", root="/releases"
)


def jetson(monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    monkeypatch.setattr(LocalDevice, "facts", lambda self: facts(**more))


def test_a_jetson_builds_natively(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jetson(monkeypatch)
    place = places.choose(JETSON, tmp_path)
    assert isinstance(place.device, LocalDevice)
    assert place.ready
    assert place.command.endswith(".pyz build")
    assert "/releases/agents/" in place.command


def test_a_gpu_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jetson(monkeypatch)
    thor = JETSON.model_copy(update={"compute_capability": "sm_110", "name": "a-thor"})
    with pytest.raises(StageError, match="built on the device, and this machine has sm_87"):
        places.choose(thor, tmp_path)


def test_a_plan_shows_what_each_jetpack_would_run(finished_copy: Path) -> None:
    result = run_toolkit(finished_copy, "plan", "jetson-orin", "--host", "orin", "--profile", "tiny")
    for jetpack, tensorrt, base in (
        ("5.1", "8.5.2.2", "l4t-tensorrt:r8.5.2.2-devel"),
        ("6.2", "10.3.0.30", "l4t-tensorrt:r10.3.0-devel"),
        ("7.2", "10.16.2.10", "tensorrt:26.05-py3"),
    ):
        lines = [line for line in result.stdout.splitlines() if f"JetPack {jetpack} " in line]
        native, contained = lines
        assert f'TensorRT {tensorrt}:  python3 "$HOME/.toolkit/agents/' in native
        assert base in contained
        assert "docker run --rm" in contained
        assert "--runtime nvidia" in contained
    assert "is not known" in result.stderr


def test_what_does_not_fit_together_is_refused_in_the_file() -> None:
    for wrong, message in (
        ({"build": {"where": "device"}, "runtime": "tensorrt", "compute_capability": None}, "compute_capability"),
        ({"build": {"where": "container"}, "runtime": "onnxruntime"}, "is not built 'container'"),
        ({"build": {"hardware_compatibility": "ampere+"}, "compute_capability": "sm_75"}, "sm_80 and newer"),
        ({"build": {"dla_core": 0}}, "only Jetson modules have a DLA"),
        ({"build": {"hardware_compatibility": "ampere+"}, "arch": "aarch64"}, "no hardware compatibility"),
    ):
        with pytest.raises(ValueError, match=message):
            target("sm_80", **wrong)


# --- an engine that does not fit the device ----------------------------------------------------------------


def _engine(version: str) -> Artifact:
    found = {
        "runtime": "tensorrt", "version": version, "gpu": "Orin", "compute_capability": ["sm_87"], "l4t": "36.4.3",
        "hardware_compatibility": "none",
    }  # fmt: skip
    return Artifact("build", version, Path(), version, {"fingerprint": found}, {}, False, 0.0, "")


@pytest.mark.parametrize("asked", [False, True], ids=["refused", "rebuilt"])
def test_a_stale_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: bool
) -> None:
    jetson(monkeypatch)
    built_at: list[Device] = []

    def build_there(job: Any, stages: Any, networks: Any, place: places.Place) -> Artifact:
        built_at.append(place.device)
        return _engine("10.3.0.30")

    monkeypatch.setattr(pipeline, "build", build_there)
    job: Any = SimpleNamespace(rebuild_stale=asked, target=JETSON)
    stages = Runner(Store(tmp_path), Console(), "commit")
    device = LocalDevice(tmp_path)
    stale = _engine("10.16.1.11")
    difference = "built with TensorRT 10.16.1.11, the device has 10.3.0.30"
    networks: Any = None
    if not asked:
        with pytest.raises(StageError, match=difference) as error:
            pipeline.fit(job, stages, networks, stale, device)
        assert "--rebuild-stale" in str(error.value.hint)
        return
    assert pipeline.fit(job, stages, networks, stale, device).meta["fingerprint"]["version"] == "10.3.0.30"
    assert built_at == [device]
    assert f"{difference}; building it there" in capsys.readouterr().err
    assert pipeline.fit(job, stages, networks, _engine("10.3.0"), device).digest == "10.3.0", "no build number told"
    assert len(built_at) == 1
