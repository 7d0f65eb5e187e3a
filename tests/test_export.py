from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from toolkit import export, graphs
from toolkit.compression import data as datasets
from toolkit.compression import models
from toolkit.compression.quantization import quantize
from toolkit.errors import StageError
from toolkit.store import Artifact, Store
from toolkit.workload import Model

Finished = tuple[Path, dict[str, Any]]


def artifact(finished: Finished, stage: str) -> Artifact:
    folder, document = finished
    found = Store(folder / "build" / "store").lookup(stage, document["artifacts"][stage])
    assert found is not None
    return found


def test_the_graph_takes_bytes_of_any_batch(finished: Finished) -> None:
    exported = artifact(finished, "export")
    graph = onnx.load(exported.file("model.onnx"))
    (image,) = graph.graph.input
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    shape = image.type.tensor_type.shape.dim
    assert shape[0].dim_param == "batch"
    assert [d.dim_value for d in shape[1:]] == [3, 16, 16]
    assert graph.opset_import[0].version == 17
    content = exported.file("model.onnx").read_bytes()
    for batch in (1, 5):
        (logits,) = export.run_onnx(content, np.zeros((batch, 3, 16, 16), np.uint8))
        assert logits.shape == (batch, 10)


def test_the_metadata_say_what_it_is(finished: Finished) -> None:
    graph = onnx.load(artifact(finished, "export").file("model.onnx"))
    properties = {entry.key: entry.value for entry in graph.metadata_props}
    final = finished[1]["model"]["final"]
    assert json.loads(properties["classes"]) == [str(n) for n in range(10)]
    assert properties["input_size"] == "16"
    assert int(properties["flops"]) == final["flops"]
    assert int(properties["params"]) == final["params"]
    assert float(properties["accuracy"]) == pytest.approx(final["accuracy"], abs=1e-6)
    assert len(properties["weights_sha256"]) == 64


def test_it_was_compared_with_pytorch(finished: Finished) -> None:
    comparison = artifact(finished, "export").meta["comparison"]
    assert comparison["images"] == 256
    assert comparison["max_absolute"] < 1e-3
    assert comparison["top1_agreement"] == 1.0


@pytest.mark.parametrize("node", ["/network/layer2/layer2.1/conv1/Conv", "/network/fc/Gemm"])
def test_the_first_layer_that_differs_is_named(finished: Finished, tmp_path: Path, node: str) -> None:
    data, tuned = artifact(finished, "data"), artifact(finished, "finetune")
    network = models.restore(Model.parse("resnet20"), 10, tuned.file("model.pth")).eval()
    wrapped = export._WithPreprocessing(network, data.meta["mean"], data.meta["std"]).eval()
    graph = onnx.load(artifact(finished, "export").file("model.onnx"))
    broken = next(n for n in graph.graph.node if n.name == node)
    weight = next(w for w in graph.graph.initializer if w.name == broken.input[1])
    values = onnx.numpy_helper.to_array(weight) * 1.5
    weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), weight.name))
    onnx.save(graph, tmp_path / "model.onnx")
    images = np.array(datasets.load(data, "test").first(32).images)
    layer = node.removeprefix("/network/").split("/")[:-1]
    expected = "layer2.1.conv1" if "layer2" in node else layer[0]
    with pytest.raises(StageError, match=f"first layer that differs is '{expected}'"):
        export.compare(wrapped, tmp_path / "model.onnx", images)


def make(finished: Finished, tmp_path: Path, precision: Any, spelling: Any) -> Artifact:
    data, exported = artifact(finished, "data"), artifact(finished, "export")
    return Store(tmp_path).produce(
        "quantize",
        f"{precision}-{spelling}",
        lambda work: quantize(work, data, exported, precision, spelling, 64),
        config={},
        inputs={},
    )


def agreement(finished: Finished, quantized: Artifact) -> float:
    images = np.array(datasets.load(artifact(finished, "data"), "test").images)
    (expected,) = export.run_onnx(artifact(finished, "export").file("model.onnx").read_bytes(), images)
    (found,) = export.run_onnx(quantized.file("model.onnx").read_bytes(), images)
    return float((expected.argmax(1) == found.argmax(1)).mean())


def tensor_types(path: Path) -> set[int]:
    graph = onnx.load(path).graph
    zero_points = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"}
    return {value.data_type for value in graph.initializer if value.name in zero_points}


def test_int8_for_onnx_runtime_has_uint8_activations_and_integer_biases(finished: Finished, tmp_path: Path) -> None:
    quantized = make(finished, tmp_path, "int8", "onnxruntime")
    assert tensor_types(quantized.file("model.onnx")) == {onnx.TensorProto.UINT8}
    kinds = {value.data_type for value in onnx.load(quantized.file("model.onnx")).graph.initializer}
    assert onnx.TensorProto.INT32 in kinds
    assert agreement(finished, quantized) > 0.9
    assert quantized.meta["calibration_images"] == 64


def test_int8_for_tensorrt_is_symmetric_with_float_biases(finished: Finished, tmp_path: Path) -> None:
    quantized = make(finished, tmp_path, "int8", "tensorrt")
    graph = onnx.load(quantized.file("model.onnx")).graph
    assert tensor_types(quantized.file("model.onnx")) == {onnx.TensorProto.INT8}
    zero_points = {node.input[2] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for value in graph.initializer:
        if value.name in zero_points:
            assert value.data_type == onnx.TensorProto.INT8, "no int32 bias is dequantised"
            assert not onnx.numpy_helper.to_array(value).any(), "every zero point is zero"
    assert agreement(finished, quantized) > 0.9


@pytest.mark.parametrize(("said", "threads"), [("1", 1), ("3,2", 3), ("", 0), ("all", 0)])
def test_a_graph_on_the_host_takes_the_threads_of_its_process(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, said: str, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    session = graphs.session(artifact(finished, "export").file("model.onnx").read_bytes())
    assert session.get_session_options().intra_op_num_threads == threads


def test_fp16_is_a_cast_of_the_whole_graph(finished: Finished, tmp_path: Path) -> None:
    quantized = make(finished, tmp_path, "fp16", "tensorrt")
    graph = onnx.load(quantized.file("model.onnx")).graph
    heavy = {name for node in graph.node if node.op_type in ("Conv", "Gemm") for name in node.input}
    weights = {value.data_type for value in graph.initializer if value.name in heavy}
    assert weights == {onnx.TensorProto.FLOAT16}
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert agreement(finished, quantized) > 0.97


def test_metadata_survive_quantization(finished: Finished, tmp_path: Path) -> None:
    for precision in ("int8", "fp16"):
        path = make(finished, tmp_path, precision, "tensorrt").file("model.onnx")
        assert {"classes", "weights_sha256"} <= {entry.key for entry in onnx.load(path).metadata_props}
