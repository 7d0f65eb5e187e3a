from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import image_folder
from toolkit.compression import data
from toolkit.errors import StageError, UsageError
from toolkit.store import Artifact, Store
from toolkit.workload import Data

COUNTS = {"train": {"dark": 20, "light": 30}, "test": {"dark": 4, "light": 6}}


def prepare(tmp_path: Path, spec: Data, size: int = 16) -> Artifact:
    return Store(tmp_path / "store").produce(
        "data",
        "k",
        lambda work: data.prepare(work, spec, size, tmp_path / "downloads"),
        config={},
        inputs={},
        rerun=True,
    )


def folder(path: Path, **options: Any) -> Data:
    return Data.parse(f"imagefolder:{path}", **options)


def test_digits(tmp_path: Path) -> None:
    artifact = prepare(tmp_path, Data.parse("digits"), 32)
    assert artifact.meta["counts"] == {"train": 1295, "val": 143, "test": 359}
    train = data.load(artifact, "train")
    assert train.images.shape == (1295, 3, 32, 32)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int64
    assert set(train.labels[:200]) == set(range(10)), "the order is shuffled"
    seen = {image.tobytes() for split in data.SPLITS for image in data.load(artifact, split).images}
    assert len(seen) == 1797, "no image is in two splits"
    assert prepare(tmp_path, Data.parse("digits"), 32).digest == artifact.digest


def test_image_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", COUNTS)
    (root / "train" / "dark" / ".DS_Store").write_text("litter")
    Image.new("L", (9, 30), 10).save(root / "train" / "dark" / "grey.png")
    artifact = prepare(tmp_path, folder(root))
    assert artifact.meta["classes"] == ["dark", "light"]
    assert artifact.meta["counts"] == {"train": 46, "val": 5, "test": 10}
    test = data.load(artifact, "test")
    for image, label in zip(test.images, test.labels, strict=True):
        assert (image.mean() > 60) == (label == 1)


def test_val_serves_as_test_where_there_is_no_test(tmp_path: Path) -> None:
    counts = {"train": COUNTS["train"], "val": COUNTS["test"]}
    artifact = prepare(tmp_path, folder(image_folder(tmp_path / "images", counts)))
    assert artifact.meta["counts"] == {"train": 45, "val": 5, "test": 10}


def test_val_is_taken_where_the_set_brings_one(tmp_path: Path) -> None:
    counts = COUNTS | {"val": {"dark": 3, "light": 3}}
    artifact = prepare(tmp_path, folder(image_folder(tmp_path / "images", counts)))
    assert artifact.meta["counts"] == {"train": 50, "val": 6, "test": 10}


def test_mean_and_std_are_those_of_the_training_images(tmp_path: Path) -> None:
    artifact = prepare(tmp_path, Data.parse("digits"), 8)
    pixels = np.array(data.load(artifact, "train").images) / 255
    assert artifact.meta["mean"] == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert artifact.meta["std"] == pytest.approx(pixels.std((0, 2, 3)).tolist(), abs=1e-5)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_corrupt_image_is_named_or_counted(tmp_path: Path, content: bytes | None) -> None:
    root = image_folder(tmp_path / "images", COUNTS)
    bad = root / "train" / "light" / "3.png"
    bad.write_bytes(bad.read_bytes()[:80] if content is None else content)
    with pytest.raises(UsageError, match=r"light/3\.png is corrupt") as error:
        prepare(tmp_path, folder(root))
    assert "--skip-bad-images" in str(error.value.hint)
    artifact = prepare(tmp_path, folder(root, skip_bad_images=True))
    assert len(artifact.meta["skipped"]) == 1
    assert sum(artifact.meta["counts"].values()) == 59


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", COUNTS)
    (root / "test" / "dark" / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match=r"notes\.txt is not an image file"):
        prepare(tmp_path, folder(root))


@pytest.mark.parametrize(("make", "what"), [(Path.mkdir, "a folder"), (lambda p: p.symlink_to("x"), "a link to")])
def test_what_stands_among_the_images_is_named(tmp_path: Path, make: Callable[[Path], None], what: str) -> None:
    root = image_folder(tmp_path / "images", COUNTS)
    make(root / "test" / "dark" / "more")
    with pytest.raises(UsageError, match=f"more is {what}"):
        data.fingerprint(folder(root), tmp_path / "index", remember=True)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train": {"a": 2, "b": 2}}, "has no test or val folder"),
        ({"test": {"a": 2, "b": 2}}, "has no train folder"),
        ({"train": {"a": 2}, "test": {"a": 2}}, "only one class, 'a'"),
        ({"train": {"a": 2, "b": 2}, "test": {"a": 2}}, "differ: b stands in only one"),
        ({"train": {"a": 2, "b": 0}, "test": {"a": 2, "b": 1}}, "b has no images"),
        ({"train": {}, "test": {}}, "has no train folder"),
        ({"train": {"a": 1, "b": 9}, "test": {"a": 1, "b": 1}}, "too few to set one aside"),
    ],
)
def test_a_wrong_layout_is_explained(tmp_path: Path, counts: dict[str, dict[str, int]], message: str) -> None:
    root = image_folder(tmp_path / "images", counts)
    root.mkdir(exist_ok=True)
    spec = folder(root)

    def both() -> None:
        data.fingerprint(spec, tmp_path / "index", remember=True)
        prepare(tmp_path, spec)

    with pytest.raises(UsageError, match=message) as error:
        both()
    assert error.value.hint


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        data.fingerprint(folder(tmp_path / "nowhere"), tmp_path / "index", remember=True)


def test_the_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    index = tmp_path / "store" / "index"
    first = image_folder(tmp_path / "a", COUNTS)
    shutil.copytree(first, tmp_path / "b")
    before = data.fingerprint(folder(first), index, remember=True)
    assert data.fingerprint(folder(tmp_path / "b"), index, remember=True) == before
    assert data.fingerprint(folder(first), index, remember=True) == before
    assert len(list(index.iterdir())) == 2
    assert data.fingerprint(folder(first), tmp_path / "plan", remember=False) == before
    assert not (tmp_path / "plan").exists()
    Image.new("RGB", (5, 5)).save(first / "train" / "dark" / "0.png")
    assert data.fingerprint(folder(first), index, remember=True) != before


def test_cifar10_is_read_as_torchvision_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    place = tmp_path / "downloads" / "cifar-10-batches-py"
    place.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        batch = {
            "data": random.integers(0, 256, (20, 3072)).astype(np.uint8),
            "labels": [i % 10 for i in range(20)],
        }
        (place / name).write_bytes(pickle.dumps(batch))
    names = [f"class {number}" for number in range(10)]
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    artifact = prepare(tmp_path, Data.parse("cifar10"), 32)
    assert artifact.meta["classes"] == names
    assert artifact.meta["counts"] == {"train": 90, "val": 10, "test": 20}


def test_cifar10_without_a_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing")
    with pytest.raises(StageError, match="CIFAR-10 could not be downloaded"):
        prepare(tmp_path, Data.parse("cifar10"), 32)
