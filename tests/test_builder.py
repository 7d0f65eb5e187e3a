"""The builder, with a stand-in for each TensorRT that there may be, and with the real TensorRT for RTX."""

from __future__ import annotations

import json
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.nvidia import A100, ORIN, PRECISIONS, T4, VERSIONS, about, graph, play, request, write
from toolkit.agent import builder, caches, engine, fingerprint, releases, trt
from toolkit.agent.protocol import Refusal

ODD = "StringNormalizer"
ONE = {"min": 1, "opt": 1, "max": 1}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An A100 with TensorRT 10.3."""
    return play(monkeypatch)


def cache_of(folder: Path) -> Path:
    return next((folder / "root" / "caches").glob("*.timing.cache"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_builds_every_precision(
    version: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt = play(monkeypatch, version)
    model = graph(tmp_path / "model.onnx", precision)
    built = engine.build(request(tmp_path, model, precision))
    assert built["layers"] == {"checked": 2, "unknown": [], "other": {}}
    assert built["expected"] == {"features.conv": precision, "head": precision}
    assert built["fingerprint"]["version"] == tensorrt.__version__
    assert built["notes"] == []
    assert built["provider"] == f"TensorRT {tensorrt.__version__}"
    plan = about((tmp_path / "model.engine").read_bytes())
    weakly = {"fp16": {"FP16"}, "int8": {"INT8"}} if version.startswith("8") else {}
    strict = set() if precision == "fp32" else {"TF32"}
    assert set(plan["flags"]) == weakly.get(precision, set()) | strict
    assert plan["shapes"] == {"images": [[1, 3, 8, 8], [4, 3, 8, 8], [8, 3, 8, 8]]}
    assert json.loads((tmp_path / "engine.json").read_text()) == json.loads(json.dumps(built))
    layers = json.loads((tmp_path / "layers.json").read_text())
    assert set(layers) == {"Layers", "I/O Tensors" if version == "11.0" else "Bindings"}
    assert engine.read(str(tmp_path), str(tmp_path))["sha256"] == built["sha256"]


def test_an_int8_graph_that_also_holds_fp16_may_use_both_on_tensorrt_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, "8.5")
    asked = request(tmp_path, graph(tmp_path / "model.onnx", "int8"), "int8")
    asked["expected"]["another"] = "fp16"
    builder.build(asked)
    assert about((tmp_path / "model.engine").read_bytes())["flags"] == ["FP16", "INT8", "TF32"]


def test_a_graph_of_fixed_batch_needs_no_profile(device: Any, tmp_path: Path) -> None:
    builder.build(request(tmp_path, graph(tmp_path / "model.onnx", batch=2), batches=None))
    assert about((tmp_path / "model.engine").read_bytes())["shapes"] == {}


def test_progress_comes_from_the_monitor(device: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder.build(request(tmp_path, graph(tmp_path / "model.onnx")))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["text"] == "Building Engine"
    assert events[-1]["done"] == events[-1]["total"] > 1


# memory


def test_a_smaller_workspace_is_tried_and_noted(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_MEMORY", 300 << 20)
    built = builder.build(request(tmp_path, graph(tmp_path / "model.onnx")))
    assert built["settings"]["workspace_bytes"] == 256 << 20
    assert [note.split(" (")[0] for note in built["notes"]] == [
        "the builder ran out of memory with a workspace of 4096 MiB",
        "the builder ran out of memory with a workspace of 1024 MiB",
    ]
    assert "insufficient memory" in built["notes"][0]
    assert built["notes"][1].endswith("tried again with 256 MiB")


def test_memory_that_never_suffices_is_a_refusal(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_MEMORY", 1 << 20)
    with pytest.raises(Refusal, match="even with a workspace of 32 MiB") as error:
        builder.build(request(tmp_path, graph(tmp_path / "model.onnx")))
    assert "add swap" in str(error.value.hint)
    assert not (tmp_path / "model.engine").exists()


@pytest.mark.parametrize(
    ("gpu", "memory", "asked", "given"),
    [
        (ORIN, 8 << 30, None, 512),
        (ORIN, 32 << 30, None, 4096),
        (A100, 8 << 30, None, 4096),
        (A100, 8 << 30, 64 << 20, 64),
    ],
)
def test_the_workspace_suits_the_device(
    gpu: dict[str, Any],
    memory: int,
    asked: int | None,
    given: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play(monkeypatch, gpu=gpu, memory_bytes=memory)
    builder.build(request(tmp_path, graph(tmp_path / "model.onnx"), workspace_bytes=asked))
    assert about((tmp_path / "model.engine").read_bytes())["workspace"] == given << 20


# timing cache


def test_a_second_build_times_nothing_anew(device: Any, tmp_path: Path) -> None:
    asked = request(tmp_path, graph(tmp_path / "model.onnx"))
    first = builder.build(asked)
    assert device._layers_timed > 0
    second = builder.build(asked)
    assert device._layers_timed == 0
    assert second["notes"] == []
    assert second["sha256"] == first["sha256"]


@pytest.mark.parametrize("content", [b"", b"half"])
def test_a_damaged_cache_is_dropped_with_a_note(device: Any, content: bytes, tmp_path: Path) -> None:
    asked = request(tmp_path, graph(tmp_path / "model.onnx"))
    builder.build(asked)
    cache_of(tmp_path).write_bytes(content)
    built = builder.build(asked)
    assert built["notes"] == [f"the cache {cache_of(tmp_path).name} was damaged and is not used"]
    assert device._layers_timed > 0
    assert builder.build(asked)["notes"] == []


def test_a_damaged_cache_is_noted_once_however_often_memory_runs_out(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(tmp_path, graph(tmp_path / "model.onnx"))
    builder.build(asked)
    cache_of(tmp_path).write_bytes(b"half")
    monkeypatch.setattr(device, "_MEMORY", 300 << 20)
    notes = builder.build(asked)["notes"]
    assert len([note for note in notes if "damaged" in note]) == 1


@pytest.mark.parametrize("content", [b"nonsense", b'timing{"version": "10.3.0.30", "gpu": "another", "timed": []}'])
def test_a_cache_that_tensorrt_refuses_is_dropped_with_a_note(device: Any, content: bytes, tmp_path: Path) -> None:
    asked = request(tmp_path, graph(tmp_path / "model.onnx"))
    builder.build(asked)
    caches.write(str(cache_of(tmp_path)), content)
    built = builder.build(asked)
    assert built["notes"] == ["TensorRT did not take the timing cache; it starts with an empty one"]
    builder.build(asked)
    assert device._layers_timed == 0, "the new cache has taken the old one's place"


def test_a_cache_belongs_to_a_device_as_it_is() -> None:
    here = {"runtimes": {"tensorrt": "10.3.0.30"}, "gpus": [ORIN], "l4t": "36.4.3", "power_mode": "MAXN"}
    others = [
        {"runtimes": {"tensorrt": "10.3.0.26"}},
        {"gpus": [T4]},
        {"gpus": []},
        {"l4t": "36.4.4"},
        {"power_mode": "15W"},
    ]
    keys = {caches.key("tensorrt", here | other) for other in [{}, *others]}
    assert len(keys) == 6


# what is not what was asked for


@pytest.mark.parametrize("version", VERSIONS)
def test_a_layer_in_another_precision_is_named(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt = play(monkeypatch, version)
    monkeypatch.setattr(tensorrt, "_FP32", "features.conv")
    with pytest.raises(Refusal, match=r"runs 1 of 2 layers .*: features\.conv \(fp32 instead of fp16\)$"):
        builder.build(request(tmp_path, graph(tmp_path / "model.onnx", "fp16"), "fp16"))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_operator_is_named_with_its_node(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, version)
    with pytest.raises(Refusal, match=rf"cannot be parsed: text\.clean \({ODD}\): .*Plugin not found") as error:
        builder.build(request(tmp_path, odd(tmp_path), expected={}))
    assert "replace that operator" in str(error.value.hint)


def odd(folder: Path, name: str | None = "text.clean") -> Path:
    nodes = [
        helper.make_node("Cast", ["images"], ["text"], "cast", to=TensorProto.FLOAT),
        helper.make_node(ODD, ["text"], ["logits"], name),
    ]
    return write(
        folder / "odd.onnx", nodes, [], shape=["batch", 3, 8, 8], output=(TensorProto.FLOAT, ["batch", 10])
    )


@pytest.mark.parametrize("version", ["8.5", "10.3"])
def test_a_node_without_a_name_is_told_by_its_operator(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, version)
    with pytest.raises(Refusal, match=rf"a node without a name \({ODD}\)"):
        builder.build(request(tmp_path, odd(tmp_path, None), expected={}))


@pytest.mark.parametrize("zero", [np.array(3, np.int8), np.array(0, np.uint8)])
@pytest.mark.parametrize("version", ["8.5", "10.3"])
def test_quantisation_that_tensorrt_does_not_take_is_refused(
    version: str, zero: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, version)
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], "cast", to=TensorProto.FLOAT),
        helper.make_node("QuantizeLinear", ["pixels", "step", "zero"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["logits"], "dequantize"),
    ]
    constants = [numpy_helper.from_array(np.array(0.1, np.float32), "step"), numpy_helper.from_array(zero, "zero")]
    shape = ["batch", 3, 8, 8]
    model = write(tmp_path / "odd.onnx", nodes, constants, shape=shape, output=(TensorProto.FLOAT, shape))
    with pytest.raises(Refusal, match=r"cannot be parsed: quantize \(QuantizeLinear\): .*zero"):
        builder.build(request(tmp_path, model, "int8"))


def test_a_file_that_is_no_graph_is_refused(device: Any, tmp_path: Path) -> None:
    asked = request(tmp_path, graph(tmp_path / "model.onnx"))
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(Refusal, match="cannot be parsed: Failed to parse the ONNX model"):
        builder.build(asked)


@pytest.mark.parametrize(
    ("open_shape", "batches", "told"),
    [({}, None, r"\(\?x3x8x8\)"), ({"size": "side"}, {"min": 1, "opt": 4, "max": 8}, r"\(\?x3x\?x\?\)")],
)
def test_a_dynamic_shape_without_a_profile_is_refused(
    open_shape: dict[str, Any], batches: dict[str, int] | None, told: str, device: Any, tmp_path: Path
) -> None:
    model = graph(tmp_path / "model.onnx", **open_shape)
    with pytest.raises(Refusal, match=f"input 'images' is of dynamic shape {told}, and no optimisation profile"):
        builder.build(request(tmp_path, model, batches=batches))


def test_without_a_gpu_the_builder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, gpu=None)
    with pytest.raises(Refusal, match="the builder cannot start: CUDA initialization failure with error: 35"):
        builder.build(request(tmp_path, graph(tmp_path / "model.onnx")))


# options


@pytest.mark.parametrize(
    ("version", "gpu", "options", "message"),
    [
        ("8.5", A100, {"hardware_compatibility": "ampere+"}, r"TensorRT 8\.5\.2\.2 has no hardware compatibility"),
        ("10.3", A100, {"hardware_compatibility": "same-compute-capability"}, "no hardware compatibility 'same-c"),
        ("10.3", T4, {"hardware_compatibility": "ampere+"}, "hardware compatibility needs an Ampere GPU"),
        ("8.5", A100, {"optimization_level": 5}, "has no an? optimisation level"),
        ("10.3", A100, {"dla_core": 0}, "asks for DLA core 0 and this device offers 0"),
        ("10.16", ORIN, {"dla_core": 0}, r"this device offers 0 to TensorRT 10\.16"),
        ("10.3", ORIN, {"dla_core": 2}, "asks for DLA core 2 and this device offers 2"),
    ],
)  # fmt: skip
def test_an_option_that_is_not_to_be_had_is_refused(
    version: str,
    gpu: dict[str, Any],
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play(monkeypatch, version, gpu)
    with pytest.raises(Refusal, match=message):
        builder.build(request(tmp_path, graph(tmp_path / "model.onnx"), **options))


@pytest.mark.parametrize(
    ("version", "level"), [("8.6", "ampere+"), ("10.3", "ampere+"), ("11.0", "same-compute-capability")]
)
def test_hardware_compatibility(version: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, version)
    built = builder.build(request(tmp_path, graph(tmp_path / "model.onnx"), hardware_compatibility=level))
    plan = about((tmp_path / "model.engine").read_bytes())
    assert plan["compatible"] == level.upper().replace("+", "_PLUS").replace("-", "_")
    assert built["fingerprint"]["hardware_compatibility"] == level


def test_dla_with_the_gpu_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "10.3", ORIN)
    built = builder.build(
        request(tmp_path, graph(tmp_path / "model.onnx", "fp16"), "fp16", dla_core=1, batches=ONE)
    )
    plan = about((tmp_path / "model.engine").read_bytes())
    assert "GPU_FALLBACK" in plan["flags"]
    assert [layer["type"] for layer in plan["layers"]] == ["DLA"]
    assert built["layers"]["checked"] == 0, "a DLA is one layer, which does not tell what runs in it"


def test_a_dla_takes_one_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "10.3", ORIN)
    with pytest.raises(Refusal, match="one batch size only, and the engine is to take 1 to 8") as error:
        builder.build(request(tmp_path, graph(tmp_path / "model.onnx", "fp16"), "fp16", dla_core=0))
    assert "benchmark.batches" in str(error.value.hint)


# fingerprint


def test_the_fingerprint_tells_what_the_engine_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(
        monkeypatch,
        "10.3",
        ORIN,
        runtimes={"tensorrt": "10.3.0"},
        cuda="12.6",
        driver="540.4.0",
        container="image@1",
    )
    model = graph(tmp_path / "model.onnx")
    built = builder.build(request(tmp_path, model))["fingerprint"]
    hashes = {key: built.pop(key) for key in ("onnx_sha256", "options_sha256")}
    assert built == {
        "runtime": "tensorrt",
        "version": "10.3.0.30",
        "gpu": "NVIDIA Jetson AGX Orin",
        "compute_capability": ["sm_87"],
        "hardware_compatibility": "none",
        "l4t": "36.4.3",
        "jetpack": "6.2",
        "cuda": "12.6",
        "driver": "540.4.0",
        "power_mode": "MAXN",
        "container": "image@1",
    }
    other = builder.build(request(tmp_path, model, optimization_level=5))["fingerprint"]
    assert other["onnx_sha256"] == hashes["onnx_sha256"] == releases.digest(str(model))
    assert other["options_sha256"] != hashes["options_sha256"]


def test_the_plan_of_tensorrt_8_5_does_not_tell_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, "8.5", ORIN, runtimes={"tensorrt": "8.5.2"})
    built = builder.build(request(tmp_path, graph(tmp_path / "model.onnx")))
    assert built["fingerprint"]["version"] == "8.5.2"


BUILT = {
    "runtime": "tensorrt", "version": "10.3.0.30", "gpu": ORIN["name"], "compute_capability": ["sm_87"],
    "hardware_compatibility": "none", "l4t": "36.4.3",
}  # fmt: skip
HERE = {"runtimes": {"tensorrt": "10.3.0.30"}, "gpus": [ORIN], "l4t": "36.4.3"}


@pytest.mark.parametrize(
    ("built", "here", "expected"),
    [
        ({}, {}, None),
        ({}, {"runtimes": {"tensorrt": "10.3.0"}}, None),
        ({}, {"runtimes": {"tensorrt": "10.3.0.26"}}, "built with TensorRT 10.3.0.30, the device has 10.3.0.26"),
        ({}, {"runtimes": {"tensorrt": "10.16.1.11"}}, "built with TensorRT 10.3.0.30, the device has 10.16.1.11"),
        ({}, {"runtimes": {}}, "built with TensorRT 10.3.0.30, the device has none"),
        ({}, {"gpus": []}, "built for sm_87, the device has no NVIDIA GPU"),
        ({}, {"gpus": [A100]}, "built for sm_87, the device has sm_80"),
        ({"gpu": "Orin Nano"}, {}, "built on Orin Nano, the device has NVIDIA Jetson AGX Orin"),
        ({"gpu": "Orin", "hardware_compatibility": "same-compute-capability"}, {}, None),
        ({}, {"l4t": "36.4.4"}, "built with L4T 36.4.3, the device has 36.4.4"),
        ({"compute_capability": ["sm_80"], "hardware_compatibility": "ampere+"}, {}, None),
        (
            {"compute_capability": ["sm_80"], "hardware_compatibility": "ampere+"},
            {"gpus": [T4]},
            "built for sm_80, the device has sm_75",
        ),
        (
            {"compute_capability": ["sm_80"], "hardware_compatibility": "same-compute-capability"},
            {},
            "built for sm_80, the device has sm_87",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(built: dict[str, Any], here: dict[str, Any], expected: str | None) -> None:
    assert fingerprint.mismatch(BUILT | built, HERE | here) == expected


def test_an_engine_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "10.3")
    engine.build(request(tmp_path, graph(tmp_path / "model.onnx")))
    play(monkeypatch, "10.16")
    with pytest.raises(Refusal, match=r"built with TensorRT 10\.3\.0\.30, the device has 10\.16\.1\.11") as error:
        engine.read(str(tmp_path), str(tmp_path))
    assert "--rebuild-stale" in str(error.value.hint)


def test_a_truncated_engine_is_refused(device: Any, tmp_path: Path) -> None:
    engine.build(request(tmp_path, graph(tmp_path / "model.onnx")))
    plan = tmp_path / "model.engine"
    plan.write_bytes(plan.read_bytes()[:-100])
    with pytest.raises(Refusal, match=r"the engine model\.engine is damaged"):
        engine.read(str(tmp_path), str(tmp_path))


# the real TensorRT for RTX, ahead of time

real = pytest.mark.skipif(not util.find_spec("tensorrt_rtx"), reason="TensorRT for RTX is not installed")


def rtx(folder: Path, model: Path, precision: str, *capabilities: str, **changes: Any) -> dict[str, Any]:
    asked = request(folder, model, precision, compute_capabilities=list(capabilities), **changes)
    return asked | {"runtime": "tensorrt-rtx"}


@real
@pytest.mark.parametrize(
    ("precision", "capabilities"),
    [
        ("fp16", ["sm_75"]),
        ("fp16", ["sm_80", "sm_86", "sm_89", "sm_120"]),
        ("int8", ["sm_80", "sm_86", "sm_89", "sm_120"]),
    ],
)
def test_rtx_builds_ahead_of_time(precision: str, capabilities: list[str], tmp_path: Path) -> None:
    model = graph(tmp_path / "model.onnx", precision, output="fp16" if "sm_75" in capabilities else "fp32")
    built = builder.build(rtx(tmp_path, model, precision, *capabilities))
    installed = metadata.version("tensorrt_rtx_cu13_libs")
    assert trt.plan_version((tmp_path / "model.engine").read_bytes()) == installed
    assert built["fingerprint"]["version"] == installed
    assert built["fingerprint"]["compute_capability"] == capabilities
    assert built["fingerprint"]["gpu"] is None
    assert built["layers"] is None, "there is no GPU to load it; the device checks the layers"
    assert built["notes"] == []


@real
def test_rtx_refuses_an_unknown_capability(tmp_path: Path) -> None:
    model = graph(tmp_path / "model.onnx", "fp16")
    with pytest.raises(Refusal, match="does not build for sm_87") as error:
        builder.build(rtx(tmp_path, model, "fp16", "sm_87"))
    assert "sm_75, sm_80" in str(error.value.hint)


@real
def test_rtx_refuses_fp32_on_turing(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"cannot build the engine: .*Turing \(SM75\): FP32 GEMM is not supported"):
        builder.build(rtx(tmp_path, graph(tmp_path / "model.onnx"), "fp32", "sm_75"))


@real
def test_rtx_names_an_unknown_operator(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=rf"cannot be parsed: text\.clean \({ODD}\)"):
        builder.build(rtx(tmp_path, odd(tmp_path), "fp16", "sm_80", expected={}))
