"""An ONNX file of the user's, of every kind that is taken, and of those that are not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from toolkit import adopt, garbage, onnxfile
from toolkit.compression import data as datasets
from toolkit.compression.quantization import quantize
from toolkit.errors import StageError, UsageError
from toolkit.graphs import run_onnx
from toolkit.store import Artifact, Store
from toolkit.workload import Data, Model, Normalization

SIZE = 16
IMAGENET = ("0.485,0.456,0.406", "0.229,0.224,0.225", None)
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}


def network(
    path: Path,
    *,
    shape: tuple[Any, ...] = ("N", 3, SIZE, SIZE),
    dtype: str = "float32",
    hard_batch: int = 0,
    opset: int = 17,
    names: tuple[str, str] = ("x", "y"),
) -> Path:
    """Write a small classifier of four classes; ``hard_batch`` puts a batch into its Reshape.

    Unless its input or output is called so, inner tensors have the names of the toolkit's own input and output.
    """
    random = np.random.default_rng(7)
    channels_last = shape[3] in (1, 3)
    channels = shape[3] if channels_last else shape[1]
    inside = np.float16 if dtype == "float16" else np.float32
    matrix, hidden = ("m", "h") if set(names) & {"images", "logits"} else ("images", "logits")
    weights = {
        "w": random.normal(size=(8, channels, 3, 3)).astype(inside),
        matrix: random.normal(size=(8, 4)).astype(inside),
        "shape": np.array([hard_batch or -1, 8], np.int64),
    }
    image, result = names
    nodes = []
    if dtype == "uint8":
        nodes.append(helper.make_node("Cast", [image], ["cast"], to=TensorProto.FLOAT))
    before = "cast" if dtype == "uint8" else image
    if channels_last:
        nodes.append(helper.make_node("Transpose", [before], ["nchw"], perm=[0, 3, 1, 2]))
    nodes += [
        helper.make_node("Conv", ["nchw" if channels_last else before, "w"], ["c"], "conv", strides=[2, 2]),
        helper.make_node("Relu", ["c"], [hidden]),
        helper.make_node("GlobalAveragePool", [hidden], ["p"]),
        helper.make_node("Reshape", ["p", "shape"], ["f"]),
        helper.make_node("MatMul", ["f", matrix], [result]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(image, TYPES[dtype], shape)],
        [helper.make_tensor_value_info(result, helper.np_dtype_to_tensor_dtype(np.dtype(inside)), [shape[0], 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path)
    return path


def model(path: Path, options: tuple[str | None, str | None, str | None] = IMAGENET) -> Model:
    return Model.parse(f"onnx:{path}", normalization=Normalization.parse(*options))


def prepare(tmp_path: Path, spec: str = "none", size: int = SIZE) -> Artifact:
    def make(work: Any) -> dict[str, Any]:
        return datasets.prepare(work, Data.parse(spec), size, tmp_path)

    return Store(tmp_path / "store").produce("data", spec.partition(":")[0], make, config={}, inputs={})


def take(tmp_path: Path, chosen: Model, data: Artifact | None = None, size: int = SIZE) -> Artifact:
    source = onnxfile.read(chosen, size, "fp32")
    data = data or prepare(tmp_path, size=source.size)
    return Store(tmp_path / "store").produce(
        "export", "k", lambda work: adopt.adopt(work, data, chosen, source), config={}, inputs={}, rerun=True
    )


KINDS: list[tuple[dict[str, Any], Any]] = [
    ({}, IMAGENET),
    ({}, (None, None, "-1,1")),
    ({}, (None, None, "0,255")),
    ({"shape": ("N", SIZE, SIZE, 3)}, IMAGENET),
    ({"shape": ("N", 1, SIZE, SIZE)}, ("0.5", "0.25", None)),
    ({"shape": ("N", 1, SIZE, SIZE), "opset": 12}, (None, None, "0,1")),
    ({"shape": ("N", SIZE, SIZE, 1), "dtype": "uint8"}, (None, None, None)),
    ({"dtype": "uint8"}, (None, None, None)),
    ({"dtype": "uint8", "shape": ("N", SIZE, SIZE, 3)}, (None, None, None)),
    ({"dtype": "float16"}, IMAGENET),
    ({"dtype": "float16", "shape": ("N", SIZE, SIZE, 3)}, (None, None, "-1,1")),
    ({"shape": ("N", 3, "H", "W")}, IMAGENET),
    ({"shape": (1, 3, SIZE, SIZE)}, IMAGENET),
    ({"names": ("images", "logits"), "opset": 9, "shape": (1, 3, SIZE, SIZE)}, (None, None, "0,1")),
    ({"names": ("logits", "images"), "dtype": "uint8"}, (None, None, None)),
]


@pytest.mark.parametrize(("changes", "options"), KINDS)
def test_every_kind_takes_bytes_and_computes_what_the_file_does(
    tmp_path: Path, changes: dict[str, Any], options: Any
) -> None:
    exported = take(tmp_path, model(network(tmp_path / "net.onnx", **changes), options))
    graph = onnx.load(exported.file("model.onnx"))
    (image,), (logits,) = graph.graph.input, graph.graph.output
    assert (image.name, image.type.tensor_type.elem_type) == ("images", TensorProto.UINT8)
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == ["batch", 3, SIZE, SIZE]
    assert (logits.name, logits.type.tensor_type.elem_type) == ("logits", TensorProto.FLOAT)
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["batch", 4]
    assert graph.opset_import[0].version == changes.get("opset", 17)
    assert exported.meta["comparison"]["images"] == 256
    assert exported.meta["comparison"]["top1_agreement"] > 0.99
    assert exported.meta["input"] == {"name": "images", "shape": [3, SIZE, SIZE]}
    assert (exported.meta["batch"], exported.meta["outputs"]) == ("dynamic", [4])
    assert (exported.meta["accuracy"], exported.meta["classes"]) == (None, [])
    (found,) = run_onnx(exported.file("model.onnx").read_bytes(), np.zeros((5, 3, SIZE, SIZE), np.uint8), 5)
    assert found.shape == (5, 4)
    assert found.dtype == np.float32


def test_an_inner_graph_is_renamed_too(tmp_path: Path) -> None:
    """The branches of an If see the tensors around them."""
    path = network(tmp_path / "net.onnx")
    graph = onnx.load(path)
    branch = [
        helper.make_graph(
            [helper.make_node(operator, ["x"], [f"{operator}/out"])],
            operator,
            [],
            [helper.make_tensor_value_info(f"{operator}/out", TensorProto.FLOAT, None)],
        )
        for operator in ("Identity", "Neg")
    ]
    choose = helper.make_node("If", ["yes"], ["chosen"], then_branch=branch[0], else_branch=branch[1])
    graph.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    graph.graph.node[0].input[0] = "chosen"
    graph.graph.node.insert(0, choose)
    onnx.save(graph, path)
    assert take(tmp_path, model(path)).meta["comparison"]["top1_agreement"] == 1


@pytest.mark.parametrize("batch", [1, "N"])
def test_a_graph_that_bears_one_image_only_keeps_batch_1(tmp_path: Path, batch: int | str) -> None:
    shape = (batch, 3, SIZE, SIZE)
    exported = take(tmp_path, model(network(tmp_path / "net.onnx", shape=shape, hard_batch=1)))
    assert exported.meta["batch"] == 1
    assert exported.meta["comparison"]["images"] == 256
    graph = onnx.load(exported.file("model.onnx")).graph
    for value, shape in ((graph.input[0], [1, 3, SIZE, SIZE]), (graph.output[0], [1, 4])):
        assert [d.dim_value for d in value.type.tensor_type.shape.dim] == shape


def test_a_fixed_batch_becomes_dynamic_where_it_can(tmp_path: Path) -> None:
    exported = take(tmp_path, model(network(tmp_path / "net.onnx", shape=(6, 3, SIZE, SIZE))))
    assert exported.meta["batch"] == "dynamic"
    assert exported.meta["comparison"]["images"] == 256, "whole batches of the file's own, the last one filled up"


def test_a_size_that_the_file_leaves_open_is_the_profiles(tmp_path: Path) -> None:
    chosen = model(network(tmp_path / "net.onnx", shape=("N", 3, None, None)))
    assert onnxfile.read(chosen, 24, "fp32").size == 24
    assert take(tmp_path, chosen, size=24).meta["input"]["shape"] == [3, 24, 24]


def test_weights_beside_the_file_are_taken_in_and_part_of_its_digest(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx")
    inside = onnxfile.read(model(path), SIZE, "fp32")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="net.data", size_threshold=0)
    before = onnxfile.read(model(path), SIZE, "fp32")
    assert before.digest != inside.digest
    exported = take(tmp_path, model(path))
    assert set(exported.files) == {"model.onnx"}
    assert exported.meta["comparison"]["top1_agreement"] == 1
    data = tmp_path / "net.data"
    data.write_bytes(bytes(255 - byte for byte in data.read_bytes()))
    assert onnxfile.read(model(path), SIZE, "fp32").digest != before.digest
    data.unlink()
    with pytest.raises(UsageError, match=r"keeps weights in .*net\.data, which does not exist"):
        onnxfile.read(model(path), SIZE, "fp32")


def test_more_than_2_gb_is_refused(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="net.data", size_threshold=0)
    with (tmp_path / "net.data").open("ab") as file:
        file.truncate(2**31)  # sparse: takes no room on the disk
    with pytest.raises(UsageError, match="more than 2 GB"):
        onnxfile.read(model(path), SIZE, "fp32")


def test_small_outputs_such_as_a_softmax_has_are_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(graph: onnx.ModelProto) -> None:
        graph.graph.node[-1].output[0] = "large"
        graph.graph.initializer.append(numpy_helper.from_array(np.float32(1e-5), "little"))
        graph.graph.node.append(helper.make_node("Mul", ["large", "little"], ["y"]))

    chosen = model(edited(tmp_path / "net.onnx", change))
    assert take(tmp_path, chosen).meta["comparison"]["max_relative"] < 1e-4
    right = adopt._normalize
    monkeypatch.setattr(adopt, "_normalize", lambda *arguments: right(*arguments) + np.float32(0.1))
    with pytest.raises(StageError, match=r"with its preprocessing inside, .* computes something else"):
        take(tmp_path, chosen)


def edited(path: Path, change: Any) -> Path:
    graph = onnx.load(network(path))
    change(graph)
    onnx.save(graph, path)
    return path


def second(kind: str) -> Any:
    def change(graph: onnx.ModelProto) -> None:
        value = helper.make_tensor_value_info(
            "extra" if kind == "input" else "p", TensorProto.FLOAT, ["N", 8, 1, 1]
        )
        getattr(graph.graph, kind).append(value)

    return change


def integer_output(graph: onnx.ModelProto) -> None:
    graph.graph.node[-1].output[0] = "floats"
    graph.graph.node.append(helper.make_node("ArgMax", ["floats"], ["y"], axis=1))
    graph.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.INT64, ["N", 1]))


def unknown_operator(graph: onnx.ModelProto) -> None:
    graph.graph.node[1].domain = "mine"
    graph.opset_import.append(helper.make_opsetid("mine", 1))


REFUSED: list[tuple[Any, Any, str, str]] = [
    (
        network,
        (None, None, None),
        r"'x' float32 \[N, 3, 16, 16\] .* does not say how its pixels",
        "--mean and --std",
    ),
    ({"dtype": "uint8"}, IMAGENET, "takes bytes as they are", "leave out"),
    ({"shape": ("N", 1, SIZE, SIZE)}, IMAGENET, "is grey", "one number"),
    ({"shape": ("N", 3, SIZE, 20)}, IMAGENET, r"'x' float32 \[N, 3, 16, 20\] .* is not square", "square"),
    ({"shape": ("N", 4, SIZE, SIZE)}, IMAGENET, "no dimension of 3 or 1 channels", "colour or grey"),
    (second("input"), IMAGENET, r"2 inputs: 'x' float32 .*, 'extra' float32 \[N, 8, 1, 1\]", "one input"),
    (second("output"), IMAGENET, r"2 outputs: 'y' float32 .*, 'p' float32", "keep the one that counts"),
    (integer_output, IMAGENET, r"'y' int64 \[N, 1\] .* neither float32", "before argmax"),
    (unknown_operator, IMAGENET, "ONNX Runtime cannot run .*mine", "operators of ONNX itself"),
    ({"shape": (6, 3, SIZE, SIZE), "hard_batch": 6}, IMAGENET, "ONNX Runtime cannot run", "dynamic batch"),
]


@pytest.mark.parametrize(("change", "options", "message", "hint"), REFUSED)
def test_what_cannot_be_taken_is_named_with_the_remedy(
    tmp_path: Path, change: Any, options: Any, message: str, hint: str
) -> None:
    path = tmp_path / "net.onnx"
    if isinstance(change, dict):
        network(path, **change)
    else:
        edited(path, change) if change is not network else network(path)
    with pytest.raises(UsageError, match=message) as error:
        take(tmp_path, model(path, options))
    assert hint in str(error.value.hint)


@pytest.mark.parametrize(
    ("kind", "shape"), [(TensorProto.FLOAT, ["N", 10]), (TensorProto.INT32, ["N", 3, SIZE, SIZE])]
)
def test_an_input_that_is_no_image_is_named(tmp_path: Path, kind: int, shape: list[Any]) -> None:
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)],
        "net",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "net.onnx")
    with pytest.raises(UsageError, match=r"'x' \w+ \[N, .*\] of .* is no batch of images"):
        onnxfile.read(model(tmp_path / "net.onnx"), SIZE, "fp32")


@pytest.mark.parametrize("name", ["net.onnx", "net.json"])
@pytest.mark.parametrize("content", [b"", b"not a network\n", None])
def test_what_is_no_onnx_file_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = network(tmp_path / "net.onnx").rename(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UsageError, match=rf"{name} is not") as error:
        onnxfile.read(model(path), SIZE, "fp32")
    assert error.value.hint == "export it again"


def test_an_old_opset_is_refused_for_int8_only(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx", opset=11)
    assert onnxfile.read(model(path), SIZE, "fp16").opset == 11
    with pytest.raises(UsageError, match="has ONNX opset 11, and int8 needs 13"):
        onnxfile.read(model(path), SIZE, "int8")


def test_labelled_data_give_an_accuracy_and_must_have_as_many_classes(tmp_path: Path) -> None:
    chosen = model(network(tmp_path / "net.onnx"))
    with pytest.raises(UsageError, match=r"the data have 10 classes, and .* has the shape \[4\]"):
        take(tmp_path, chosen, prepare(tmp_path, "digits"))


def inputs(tmp_path: Path, **changes: Any) -> str:
    random = np.random.default_rng(1)
    shape = changes.get("shape", (40, 3, SIZE, SIZE))
    np.save(tmp_path / "in.npy", random.integers(0, 256, shape).astype(changes.get("dtype", np.uint8)))
    return f"inputs:{tmp_path / 'in.npy'}"


@pytest.mark.parametrize("batch", [1, "N"])
@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_it_is_quantised_like_any_other(tmp_path: Path, precision: Any, batch: Any) -> None:
    network(tmp_path / "net.onnx", shape=(batch, 3, SIZE, SIZE), hard_batch=1 if batch == 1 else 0)
    data = prepare(tmp_path, inputs(tmp_path))
    exported = take(tmp_path, model(tmp_path / "net.onnx"), data)
    store = Store(tmp_path / "store")
    graph = store.produce(
        "quantize",
        "k",
        lambda work: quantize(work, data, exported, precision, "tensorrt", 512),
        config={},
        inputs={},
    )
    assert graph.meta["calibration_images"] == (20 if precision == "int8" else 0)
    assert (graph.meta["batch"], graph.meta["input"]) == (exported.meta["batch"], exported.meta["input"])
    images = np.array(datasets.load_images(data, "test"))
    size = 1 if batch == 1 else 20
    (expected,) = run_onnx(exported.file("model.onnx").read_bytes(), images, size)
    (found,) = run_onnx(graph.file("model.onnx").read_bytes(), images, size)
    assert np.abs(expected - found).max() < 0.1 * np.abs(expected).max()


def test_inputs_are_split_by_turns(tmp_path: Path) -> None:
    for shape in ((40, 3, SIZE, SIZE), (40, SIZE, SIZE, 3)):
        data = prepare(tmp_path, inputs(tmp_path, shape=shape))
        pixels = np.load(tmp_path / "in.npy")
        pixels = pixels if shape[1] == 3 else pixels.transpose(0, 3, 1, 2)
        assert np.array_equal(datasets.load_images(data, "train"), pixels[::2])
        assert np.array_equal(datasets.load_images(data, "test"), pixels[1::2])
        assert set(data.files) == {"train.images.npy", "test.images.npy"}
        garbage.of_store(Store(tmp_path / "store"), set(), time.time(), remove=True)


def test_random_inputs_are_the_same_every_time(tmp_path: Path) -> None:
    first = prepare(tmp_path / "a")
    assert first.digest == prepare(tmp_path / "b").digest
    assert set(first.files) == {"test.images.npy"}
    assert first.meta["counts"] == {"train": 0, "val": 0, "test": 256}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": np.float32}, "holds float32 of the shape"),
        ({"shape": (40, 3, 8, 8)}, r"holds uint8 of the shape \(40, 3, 8, 8\)"),
        ({"shape": (3, SIZE, SIZE)}, "holds uint8 of the shape"),
        ({"shape": (1, 3, SIZE, SIZE)}, "holds 1 image"),
    ],
)
def test_inputs_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(tmp_path, inputs(tmp_path, **changes))


@pytest.mark.parametrize("save", [np.savez, None])
def test_a_file_of_inputs_that_is_no_array_is_named(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "in.npy"
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3)) if save else file.write(b"no array")
    with pytest.raises(UsageError, match=r"in\.npy (holds several arrays|is not a NumPy file)"):
        prepare(tmp_path, f"inputs:{path}")
