"""What the network says from PyTorch to the device, on chains whose weak link is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from tests.test_adopt import SIZE, model, network, take
from toolkit import files, graphs, networks
from toolkit.agent.ort import Session
from toolkit.bench import attribution, reference
from toolkit.bench.agreement import require_alike
from toolkit.compression.quantization import quantize
from toolkit.config import Target
from toolkit.console import Console
from toolkit.errors import StageError
from toolkit.job import Job
from toolkit.stages import Runner
from toolkit.store import Artifact, Store, Work
from toolkit.workload import Data

NAMES = ["a", "b", "c", "d"]
NORMALISED = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGES = 300


def artifact(folder: Path, stage: str, key: str, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> Artifact:
    def write(work: Work) -> dict[str, Any]:
        for name, values in arrays.items():
            np.save(work.out / name, values)
        return meta

    return Store(folder / "store").produce(stage, key, write, config={}, inputs={})


def close_calls(path: Path) -> NDArray[np.uint8]:
    """Images that a network is least sure of, so that whatever differs shows in their classes."""
    random = np.random.default_rng(3)
    colours = random.integers(40, 216, (20 * IMAGES, 3, 1, 1))
    images = (colours + random.integers(-40, 40, (20 * IMAGES, 3, SIZE, SIZE))).astype(np.uint8)
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in NORMALISED)
    (logits,) = graphs.run_onnx(path.read_bytes(), (images / np.float32(255) - mean) / std)
    best = np.sort(logits, 1)
    return images[np.sort(np.argsort(best[:, -1] - best[:, -2])[:IMAGES])]


class Chain:
    """A network in every form that it takes on its way, and what each says of the same images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = close_calls(network(folder / "net.onnx"))
        splits = {"test.images.npy": self.images, "train.images.npy": self.images[::4]}
        counts = {"test": IMAGES, "train": IMAGES // 4}
        self.unlabelled = artifact(folder, "data", "unlabelled", splits, {"classes": [], "counts": counts})
        self.exported = take(folder, model(folder / "net.onnx"), self.unlabelled)
        self.graph = Store(folder / "store").produce(
            "quantize",
            "int8",
            lambda work: quantize(work, self.unlabelled, self.exported, "int8", "onnxruntime", 64),
            config={},
            inputs={},
        )
        self.labels = self.run(self.exported.file("model.onnx")).argmax(1)
        self.labels[::10] = (self.labels[::10] + 1) % 4  # nobody is always right
        splits["test.labels.npy"] = self.labels
        self.data = artifact(folder, "data", "labelled", splits, {"classes": NAMES, "counts": counts})
        unpruned = self.run(self.altered(0.05))
        self.baseline = artifact(folder, "train", "b", {"test.logits.npy": unpruned}, {})
        self.tuned = artifact(
            folder, "finetune", "t", {"test.logits.npy": self.run(self.exported.file("model.onnx"))}, {}
        )

    def run(self, path: Path) -> NDArray[np.float32]:
        """What an engine of this graph says: the agent's own session, which optimises."""
        logits: NDArray[np.float32] = Session(str(path), 1, optimize=True).run(self.images)
        return logits

    def refer(self, graph: Artifact, data: Artifact | None = None) -> Artifact:
        """The stage, by a key of its own."""
        given = data or self.data
        inputs = {"data": given, "exported": self.exported, "graph": graph}
        key = Store.key("reference", 1, {}, inputs)
        return Store(self.folder / "store").produce(
            "reference",
            key,
            lambda work: reference.reference(work, given, self.exported, graph),
            config={},
            inputs=inputs,
        )

    def altered(self, share: float) -> Path:
        """The exported graph with other weights, by this share of each."""
        altered = onnx.load(self.exported.file("model.onnx"))
        weight = next(tensor for tensor in altered.graph.initializer if tensor.name == "w")
        values = numpy_helper.to_array(weight)
        noise = np.random.default_rng(5).normal(1, share, values.shape).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(values * noise, weight.name))
        onnx.save(altered, self.folder / "altered.onnx")
        return self.folder / "altered.onnx"

    def attribute(self, device: NDArray[np.float32], graph: Artifact, **other: Any) -> dict[str, Any]:
        """Attribute what a device says, and return both of what comes of it."""
        np.save(self.folder / "logits.npy", device)
        given: dict[str, Any] = {"data": self.data, "baseline": self.baseline, "tuned": self.tuned} | other
        found = attribution.attribute(
            self.folder, **given, reference=self.refer(graph, given["data"]), logits=self.folder / "logits.npy"
        )
        return found | {"whole": json.loads((self.folder / "attribution.json").read_text())}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"))


def steps(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["cause"]: step for step in found["attribution"]["steps"]}


def test_the_reference_is_what_onnx_runtime_says_of_all_images(chain: Chain) -> None:
    made = chain.refer(chain.graph)
    assert set(made.files) == {"exported.logits.npy", "graph.logits.npy"}
    for name, of in (("exported", chain.exported), ("graph", chain.graph)):
        logits = reference.load(made, name)  # type: ignore[arg-type]
        (expected,) = graphs.run_onnx(of.file("model.onnx").read_bytes(), chain.images)
        assert np.array_equal(logits, expected)
        assert logits.dtype == np.float32
        assert made.meta["accuracy"][name] == graphs.top1(chain.labels, expected)
    assert (made.meta["images"], made.meta["precision"]) == (IMAGES, "int8")


def test_the_same_graph_is_computed_and_kept_once(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    whole = reference.run_onnx
    monkeypatch.setattr(reference, "run_onnx", lambda *given: runs.append(1) or whole(*given))
    made = chain.refer(chain.exported, chain.unlabelled)
    assert len(runs) == 1
    assert set(made.files) == {"exported.logits.npy"}
    assert np.array_equal(reference.load(made, "graph"), reference.load(made, "exported"))
    assert made.meta["accuracy"] == {"exported": None, "graph": None}
    assert made.meta["precision"] == "fp32"


def test_a_device_that_computes_the_graph_takes_nothing(chain: Chain) -> None:
    found = chain.attribute(chain.run(chain.exported.file("model.onnx")), chain.exported)
    assert [link["name"] for link in found["attribution"]["chain"]] == ["baseline", "final", "exported", "device"]
    assert steps(found)["device"] == {
        "from": "exported",
        "to": "device",
        "cause": "device",
        "agree": 1.0,
        "lost": 0,
        "gained": 0,
        "changed": 0,
    }
    assert found["agreement"]["top1"] == 1
    assert found["accuracy"] == pytest.approx(0.9)
    assert found["top5"] is None
    pruning = steps(found)["pruning"]
    lost = pruning["gained"] - pruning["lost"]
    assert pruning["changed"] > 0
    assert found["attribution"]["sentence"].endswith(f"pruning {points(lost)}, export 0, device 0")


def points(count: int) -> str:
    return f"{100 * count / IMAGES:+.2f}".replace("-", "−")


def test_weights_altered_on_the_device_are_the_devices_loss(chain: Chain) -> None:
    logits = chain.run(chain.altered(0.2))
    found = chain.attribute(logits, chain.exported)
    step = steps(found)["device"]
    (expected,) = graphs.run_onnx(chain.exported.file("model.onnx").read_bytes(), chain.images)
    moved = np.flatnonzero(expected.argmax(1) != logits.argmax(1))
    assert step["changed"] == len(moved) > step["lost"] > 0
    assert step["agree"] == pytest.approx(1 - len(moved) / IMAGES)
    assert steps(found)["export"]["changed"] == 0
    assert found["agreement"]["top1"] == pytest.approx(step["agree"])
    told = found["whole"]["disagreements"]
    own = [entry for entry in told if entry["cause"] == "device"]
    assert told[: len(own)] == own, "the device's own come first"
    assert [entry["image"] for entry in own] == moved[:200].tolist()
    for entry in own:
        assert entry["device"] == logits[entry["image"]].argmax()
        assert entry["expected"] == expected[entry["image"]].argmax() != entry["device"]
        assert entry["label"] == chain.labels[entry["image"]]
    with pytest.raises(StageError, match="the engine on orin computes something else than its graph"):
        require_alike(chain.refer(chain.exported), logits[:16], "fp32", "orin")


def test_what_int8_changes_is_quantizations_loss(chain: Chain) -> None:
    logits = np.array(reference.load(chain.refer(chain.graph), "graph"))
    found = chain.attribute(logits, chain.graph)
    quantization = steps(found)["quantization"]
    assert [link["name"] for link in found["attribution"]["chain"]][-2:] == ["graph", "device"]
    assert quantization["changed"] > 0
    assert steps(found)["device"]["changed"] == steps(found)["export"]["changed"] == 0
    lost = [entry for entry in found["whole"]["disagreements"] if entry["cause"] == "quantization"]
    assert len(lost) == quantization["lost"] > 0
    assert all(entry["expected"] == entry["label"] != entry["device"] for entry in lost)
    assert found["agreement"]["top1"] == pytest.approx(quantization["agree"])


def test_the_steps_add_up_to_the_loss(chain: Chain) -> None:
    found = chain.attribute(chain.run(chain.altered(0.2)), chain.graph)
    told = found["attribution"]
    net = sum(step["gained"] - step["lost"] for step in told["steps"])
    first, last = told["chain"][0]["top1"], told["chain"][-1]["top1"]
    assert net == pytest.approx((last - first) * IMAGES)
    assert last == found["accuracy"] == (np.load(chain.folder / "logits.npy").argmax(1) == chain.labels).mean()


def test_classes_and_confusion_are_counted_from_the_same_images(chain: Chain) -> None:
    logits = chain.run(chain.altered(0.2))
    whole = chain.attribute(logits, chain.exported)["whole"]
    confusion = np.array(whole["confusion"])
    for row, (index, entry) in zip(confusion, enumerate(whole["per_class"]), strict=True):
        assert row.sum() == entry["images"] == (chain.labels == index).sum()
        if entry["images"]:
            assert entry["device"] == pytest.approx(row[index] / row.sum())
        else:
            assert entry["device"] is None
    assert confusion.trace() == (logits.argmax(1) == chain.labels).sum()
    assert [entry["class"] for entry in whole["per_class"]] == NAMES == whole["classes"]


def test_the_chain_of_a_whole_job(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, document = finished
    store = Store(folder / "build" / "store")

    def made(stage: str) -> Artifact:
        found = store.lookup(stage, document["artifacts"][stage])
        assert found
        return found

    baseline, tuned = made("train"), made("finetune")
    logits = made("bench").file("round-0/logits.npy")
    found = attribution.attribute(tmp_path, made("data"), baseline, tuned, made("reference"), logits)
    rates = {link["name"]: link["top1"] for link in found["attribution"]["chain"]}
    assert list(rates) == ["baseline", "final", "exported", "graph", "device"]
    assert rates["baseline"] == baseline.meta["accuracy"] == document["model"]["baseline"]["accuracy"]
    assert rates["final"] == tuned.meta["accuracy"]
    assert rates["device"] == document["bench"]["accuracy"]
    assert steps(found)["export"]["agree"] == 1
    assert np.load(baseline.file("test.logits.npy")).dtype == np.float32


def test_without_labels_classes_are_compared_and_nothing_is_called_lost(chain: Chain) -> None:
    logits = chain.run(chain.altered(0.2))
    found = chain.attribute(logits, chain.exported, data=chain.unlabelled, baseline=None, tuned=None)
    (step,) = found["attribution"]["steps"]
    assert (step["lost"], step["gained"], step["cause"]) == (None, None, "device")
    assert step["changed"] > 0
    assert found["accuracy"] is None
    assert [link["top1"] for link in found["attribution"]["chain"]] == [None, None]
    assert found["attribution"]["sentence"] == f"images of 300 whose class changed: device {step['changed']}"
    assert found["whole"]["per_class"] == found["whole"]["confusion"] == []
    assert {entry["label"] for entry in found["whole"]["disagreements"]} == {None}
    assert {entry["baseline"] for entry in found["whole"]["disagreements"]} == {None}


def test_an_output_that_is_no_classes_has_a_difference_only(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    maps = random.normal(size=(8, 2, 4, 4)).astype(np.float32)
    meta = {"images": 8, "precision": "fp32", "accuracy": {"exported": None, "graph": None}}
    made = artifact(tmp_path, "reference", "maps", {"exported.logits.npy": maps}, meta)
    data = artifact(tmp_path, "data", "maps", {}, {"classes": []})
    np.save(tmp_path / "device.npy", maps + np.float32(0.5))
    found = attribution.attribute(tmp_path, data, None, None, made, tmp_path / "device.npy")
    assert found["attribution"] is None
    assert found["agreement"] == {"images": 8, "top1": None, "max_absolute": 0.5}
    assert not (tmp_path / "attribution.json").exists()


def test_top5_counts_as_a_stable_sort_does_and_a_nan_as_a_miss() -> None:
    random = np.random.default_rng(0)
    logits = random.integers(0, 12, (500, 25)).astype(np.float32)  # with many equals, as int8 has them
    labels = random.integers(0, 25, 500)
    first = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert attribution._top5(logits, labels) == (first == labels[:, None]).any(1).mean()
    assert attribution._top5(np.full((4, 25), np.nan, np.float32), np.zeros(4, np.int64)) == 0


def test_all_devices_share_the_reference(tmp_path: Path) -> None:
    network(tmp_path / "net.onnx")

    def compress(target: Target) -> Runner:
        job = Job(
            target=target,
            profile=files.load_profile("host-cpu"),
            model=model(tmp_path / "net.onnx"),
            data=Data.parse("none"),
            precision="fp32",
            budget=files.load_profile("host-cpu").flops,
            seed=1,
            fast=False,
            allow_fast=False,
            rebuild_stale=False,
            build=tmp_path,
        )
        stages = Runner(Store(tmp_path / "store"), Console(quiet=True), "commit")
        assert networks.compress(job, stages).reference.file("exported.logits.npy").is_file()
        return stages

    orin = files.load_target("jetson-orin")
    for target in (files.load_target("host-cpu"), orin.at("one"), orin.at("another")):
        (done,) = [done for done in compress(target).done if done.name == "reference"]
        assert done.cached == (target.name != "host-cpu")
