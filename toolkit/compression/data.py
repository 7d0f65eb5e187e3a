"""Data sets as uint8 arrays: read once, kept in the store, memory-mapped from then on."""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.agent.images import BadImage
from toolkit.agent.images import read as read_image
from toolkit.errors import StageError, UsageError
from toolkit.store import Artifact, Work, sha256_file, write_json
from toolkit.workload import Data

SPLITS = ("train", "val", "test")
_SPLIT_SEED = 20_240_501  # the split is part of the data: it does not follow the run's seed
_RANDOM_IMAGES = 256
_LITTER = {"Thumbs.db", "desktop.ini"}
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Images ``(N, 3, S, S)`` uint8 and labels ``(N,)`` int64, both memory-mapped."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Split:
        """Return the first ``count`` images (all when None); the order is shuffled once, when data are read."""
        return Split(self.images[:count], self.labels[:count])


def load(artifact: Artifact, split: str) -> Split:
    """Open one split of a ``data`` artifact without reading it into memory."""
    return Split(
        load_images(artifact, split),
        np.load(artifact.file(f"{split}.labels.npy"), mmap_mode="r"),
    )


def load_images(artifact: Artifact, split: str) -> Images:
    """Open the images of a split, ``(N, 3, S, S)`` uint8; they may be without labels."""
    images: Images = np.load(artifact.file(f"{split}.images.npy"), mmap_mode="r")
    return images


# --- what the key of the data is made of -------------------------------------------------------------------


def fingerprint(data: Data, index: Path, *, remember: bool) -> dict[str, Any]:
    """Return what identifies the data's content, for the artifact's key.

    An image folder is identified by every file's content. Reading them all at every call would be slow, so
    ``index`` (a folder) remembers the content hash of a listing of names, sizes and modification times.

    Args:
        data: Which data set.
        index: The folder.
        remember: Whether to write what was found out to it.

    Raises:
        UsageError: The folder or file is missing, or the folder's layout is wrong.
    """
    if data.kind == "inputs":
        path = Path(str(data.path)).expanduser()
        if not path.is_file():
            raise UsageError(f"the file of inputs {path} does not exist", "give --data inputs:FILE.npy")
        return {"kind": data.kind, "content": sha256_file(path)}
    if data.kind != "imagefolder":
        return {"kind": data.kind}
    if data.content is not None:
        return {"kind": data.kind, "content": data.content, "skip": data.skip_bad_images}
    layout = _image_folder(Path(str(data.path)).expanduser())
    files = list(layout.files())
    listing = hashlib.sha256()
    for path, stat in files:
        listing.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    known = index / listing.hexdigest()
    if known.is_file():
        return {"kind": data.kind, "content": known.read_text().strip('"\n'), "skip": data.skip_bad_images}
    content = hashlib.sha256()
    paths = [path for path, _ in files]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for path, digest in zip(paths, pool.map(_hash_small, paths), strict=True):
            content.update(f"{path.relative_to(layout.root)}\0".encode() + digest)
    if remember:
        index.mkdir(parents=True, exist_ok=True)
        write_json(known, content.hexdigest())
    return {"kind": data.kind, "content": content.hexdigest(), "skip": data.skip_bad_images}


def _hash_small(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


# --- reading -----------------------------------------------------------------------------------------------


def prepare(work: Work, data: Data, size: int, downloads: Path) -> dict[str, Any]:
    """Write all splits of a data set as arrays.

    Args:
        work: Receives ``{train,val,test}.{images,labels}.npy``: uint8 ``(N, 3, size, size)`` and int64 ``(N,)``;
            without labels only ``test.images.npy``, and ``train.images.npy`` of the user's own inputs.
        data: Which data set.
        size: Edge length in pixels that every image is brought to.
        downloads: Where ``cifar10`` keeps its files.

    Returns:
        ``classes`` (names), ``counts`` (images a split), ``mean`` and ``std`` (of the training images, a
        channel, on a scale of 0 to 1), ``skipped`` (files left out), ``input_size``. Without labels ``classes``
        is empty, and there is no ``mean`` and ``std``.
    """
    if not data.labelled:
        return _prepare_unlabelled(work, data, size)
    skipped: list[str] = []
    if data.kind == "digits":
        classes, parts = _digits(size)
    elif data.kind == "cifar10":
        classes, parts = _cifar10(size, downloads)
    else:
        classes, parts, skipped = _read_image_folder(work, data, size)
    if "val" not in parts:
        images, labels = parts["train"]
        train, val = _stratified(labels, 0.1)
        parts |= {"train": (images[train], labels[train]), "val": (images[val], labels[val])}
    for split in SPLITS:
        images, labels = parts[split]
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
        np.save(work.out / f"{split}.images.npy", np.ascontiguousarray(images[order]))
        np.save(work.out / f"{split}.labels.npy", labels[order].astype(np.int64))
    mean, std = _statistics(parts["train"][0])
    return {
        "classes": classes,
        "counts": {split: len(parts[split][1]) for split in SPLITS},
        "mean": mean,
        "std": std,
        "skipped": skipped,
        "input_size": size,
    }


def _prepare_unlabelled(work: Work, data: Data, size: int) -> dict[str, Any]:
    """Write inputs without labels: the even-numbered ones calibrate, the odd ones test; random ones only test."""
    if data.kind == "none":
        shape = (_RANDOM_IMAGES, 3, size, size)
        parts = {"test": np.random.default_rng(_SPLIT_SEED).integers(0, 256, shape, np.uint8)}
    else:
        images = _read_inputs(Path(str(data.path)).expanduser(), size)
        parts = {"train": images[::2], "test": images[1::2]}
    for split, images in parts.items():
        np.save(work.out / f"{split}.images.npy", np.ascontiguousarray(images))
    return {
        "classes": [],
        "counts": {split: len(parts.get(split, ())) for split in SPLITS},
        "skipped": [],
        "input_size": size,
    }


def _read_inputs(path: Path, size: int) -> Images:
    expected = f"expected uint8 images, (N, 3, {size}, {size}) or (N, {size}, {size}, 3), saved by numpy.save"
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} is not a NumPy file: {error}", expected) from error
    if not isinstance(images, np.ndarray):  # numpy.savez
        raise UsageError(f"{path} holds several arrays", expected)
    if images.dtype == np.uint8 and images.shape[1:] == (size, size, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 or images.shape[1:] != (3, size, size):
        raise UsageError(f"{path} holds {images.dtype} of the shape {images.shape}", expected)
    if len(images) < 2:
        raise UsageError(
            f"{path} holds {len(images)} image", "give two or more: one half calibrates, the other tests"
        )
    return images


Parts = dict[str, tuple[Images, Labels]]


def _statistics(images: Images) -> tuple[list[float], list[float]]:
    """Mean and standard deviation a channel, from exact integer sums."""
    pixels = images.shape[0] * images.shape[2] * images.shape[3]
    total = np.zeros(3, np.int64)
    squares = np.zeros(3, np.int64)
    for start in range(0, len(images), 1024):
        chunk = images[start : start + 1024].astype(np.int64)
        total += chunk.sum((0, 2, 3))
        squares += (chunk * chunk).sum((0, 2, 3))
    mean = total / pixels / 255
    variance = squares / pixels / 255**2 - mean**2
    return [round(float(m), 6) for m in mean], [round(max(float(v), 1e-6) ** 0.5, 6) for v in variance]


def _stratified(labels: Labels, share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split indices so that each class gives ``share`` of its images, at least one, to the second part."""
    random = np.random.default_rng(_SPLIT_SEED)
    first, second = [], []
    for label in np.unique(labels):
        indices = random.permutation(np.flatnonzero(labels == label))
        cut = max(1, round(share * len(indices)))
        if cut >= len(indices):
            raise UsageError(
                f"class number {label} has {len(indices)} training image, too few to set one aside for validation",
                "add images to it, or bring a val/ folder beside test/",
            )
        second.append(indices[:cut])
        first.append(indices[cut:])
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))


def _digits(size: int) -> tuple[list[str], Parts]:
    """Return scikit-learn's 1,797 handwritten digits (UCI ML, 8×8, 17 grey levels), 20 % of them as test split."""
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.empty((len(grey), 3, size, size), np.uint8)
    for index, pixels in enumerate(grey):
        images[index] = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    labels = bunch.target.astype(np.int64)
    train, test = _stratified(labels, 0.2)
    return [str(n) for n in range(10)], {
        "train": (images[train], labels[train]),
        "test": (images[test], labels[test]),
    }


def _cifar10(size: int, downloads: Path) -> tuple[list[str], Parts]:
    """Return CIFAR-10 (Krizhevsky 2009) from torchvision: downloaded once, verified by its checksums."""
    from torchvision.datasets import CIFAR10

    parts: Parts = {}
    classes: list[str] = []
    for split in ("train", "test"):
        try:
            downloads.mkdir(parents=True, exist_ok=True)
            dataset = CIFAR10(str(downloads), train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise StageError(
                f"CIFAR-10 could not be downloaded to {downloads}: {error}",
                "check the network, or put cifar-10-python.tar.gz there yourself",
            ) from error
        images = np.asarray(dataset.data, np.uint8).transpose(0, 3, 1, 2)
        parts[split] = (_resize(images, size), np.asarray(dataset.targets, np.int64))
        classes = list(dataset.classes)
    return classes, parts


def _resize(images: Images, size: int) -> Images:
    from PIL import Image

    if images.shape[2:] == (size, size):
        return images
    out = np.empty((len(images), 3, size, size), np.uint8)
    for index, image in enumerate(images):
        scaled = Image.fromarray(image.transpose(1, 2, 0)).resize((size, size), Image.Resampling.BILINEAR)
        out[index] = np.asarray(scaled).transpose(2, 0, 1)
    return out


# --- the user's own images ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ImageFolder:
    root: Path
    classes: list[str]
    splits: dict[str, Path]

    def files(self) -> Iterable[tuple[Path, os.stat_result]]:
        """Yield every image file with its stat, in a fixed order."""
        for split in sorted(self.splits):
            for name in self.classes:
                entries = [e for e in os.scandir(self.splits[split] / name) if _counts(e.name)]
                for entry in sorted(entries, key=lambda e: e.name):
                    if not entry.is_file():
                        what = "a folder" if entry.is_dir() else "a link to nothing"
                        raise UsageError(f"{entry.path} is {what} among the images", "take it away")
                    yield Path(entry.path), entry.stat()


def _counts(name: str) -> bool:
    return not name.startswith(".") and name not in _LITTER


def _image_folder(root: Path) -> _ImageFolder:
    """Find splits and classes; raises UsageError naming what is wrong with the layout."""
    layout = "expected train/<class>/* with test/<class>/* or val/<class>/*"
    if not root.is_dir():
        raise UsageError(f"the data folder {root} does not exist", layout)
    present = [split for split in SPLITS if (root / split).is_dir()]
    if "train" not in present or len(present) == 1:
        raise UsageError(f"{root} has no {'train' if 'train' not in present else 'test or val'} folder", layout)
    splits = {split: root / split for split in present}
    if "test" not in splits:  # ImageNet's habit: the one held-out split is called val
        splits["test"] = splits.pop("val")
    classes = {
        split: sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and _counts(entry.name))
        for split, path in splits.items()
    }
    wanted = classes["train"]
    if not wanted:
        raise UsageError(f"{splits['train']} has no class folders", layout)
    if len(wanted) == 1:
        raise UsageError(f"{splits['train']} has only one class, '{wanted[0]}'", "a classifier needs two or more")
    for split, found in classes.items():
        if found != wanted:
            odd = sorted(set(found) ^ set(wanted))
            raise UsageError(
                f"the classes of {splits[split].name}/ and train/ differ: {', '.join(odd[:5])} "
                f"{'stands' if len(odd) == 1 else 'stand'} in only one of them",
                "give both the same class folders",
            )
    for split, name in itertools.product(splits, wanted):
        if not any(_counts(entry.name) for entry in os.scandir(splits[split] / name)):
            raise UsageError(
                f"the class folder {splits[split] / name} has no images", "add some, or remove the class"
            )
    return _ImageFolder(root, wanted, splits)


def _read_image_folder(work: Work, data: Data, size: int) -> tuple[list[str], Parts, list[str]]:
    """Decode an image folder, any size and mode, on all cores."""
    layout = _image_folder(Path(str(data.path)).expanduser())
    parts: Parts = {}
    skipped: list[str] = []
    number = {name: index for index, name in enumerate(layout.classes)}
    everything = list(layout.files())
    done = 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for split, folder in layout.splits.items():
            paths = [path for path, _ in everything if path.parent.parent == folder]
            images = np.lib.format.open_memmap(
                work.resume / f"{split}.npy", mode="w+", dtype=np.uint8, shape=(len(paths), 3, size, size)
            )
            kept: list[int] = []
            for chunk in range(0, len(paths), 1024):
                some = paths[chunk : chunk + 1024]
                for offset, result in enumerate(pool.map(lambda path: _decode(path, size), some)):
                    if isinstance(result, str):
                        _refuse_or_count(result, data, skipped)
                        continue
                    images[chunk + offset] = result
                    kept.append(chunk + offset)
                done += len(some)
                work.progress(done, len(everything), "images read")
            labels = np.array([number[paths[index].parent.name] for index in kept], np.int64)
            missing = sorted(set(range(len(number))) - set(labels.tolist()))
            if missing:
                name = layout.classes[missing[0]]
                raise UsageError(f"no image of class '{name}' in {folder} can be read", "replace its files")
            parts[split] = (images if len(kept) == len(paths) else images[np.array(kept)], labels)
    return layout.classes, parts, skipped


def _refuse_or_count(problem: str, data: Data, skipped: list[str]) -> None:
    if not data.skip_bad_images:
        raise UsageError(problem, "replace or remove the file, or leave such files out with --skip-bad-images")
    skipped.append(problem)


def _decode(path: Path, size: int) -> Images | str:
    """Decode one file, or say what is wrong with it."""
    if path.suffix.lower() not in _SUFFIXES:
        return f"{path} is not an image file"
    try:
        return read_image(str(path), size)
    except BadImage as problem:
        return problem.message
