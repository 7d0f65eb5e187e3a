"""What the tests share: a small job in a folder of its own, and the command line as a user types it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from tests import warm
from toolkit import files
from toolkit.job import Job
from toolkit.workload import Data, Model

TARGET = "description: a small job\nprofile: tiny\nruntime: onnxruntime\n"
PROFILE = """\
flops: 80%
channel_divisor: 16
input_size: 16
recipe: {epochs: 3, finetune_epochs: 2, batch: 32, optimizer: sgd, lr: 0.1, train_images: 320, search_images: 64,
         flip: false, crop: 2}
benchmark: {warmup: 20 ms, duration: 100 ms, queries: 800, rounds: 1, batches: [1, 4]}
contract: {latency_p99: 1 s, max_accuracy_drop: 100 %, engine_size: 50 MB}
"""

# whoever starts the tests in the background has told them to ignore these, and so what they start
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# or every process that the tests start would compile the toolkit anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# as `make test` has it: whoever computes comes to the same bits
os.environ.setdefault("OMP_NUM_THREADS", "1")

Toolkit = Callable[..., subprocess.CompletedProcess[str]]


def write_job(folder: Path, profile: str = PROFILE, target: str = TARGET) -> Path:
    """Lay a small job's target and profile into a folder."""
    for kind, text in (("targets", target), ("profiles", profile)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / "tiny.yaml").write_text(text)
    return folder


def run_toolkit(
    folder: Path, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 400
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder, with changes of the environment."""
    return warm.run(folder, arguments, os.environ | (env or {}), timeout)


def job_of(build: Path, data: str = "digits", **changes: Any) -> Job:
    """Return a job for this machine with the shipped profile, but for what is changed of it."""
    profile = files.load_profile("host-cpu")
    given: dict[str, Any] = {
        "target": files.load_target("host-cpu"),
        "profile": profile,
        "model": Model.parse("resnet20"),
        "data": Data.parse(data),
        "precision": "fp32",
        "budget": profile.flops,
        "seed": 1,
        "fast": False,
        "allow_fast": False,
        "rebuild_stale": False,
        "build": build,
    }
    return Job(**given | changes)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_job(tmp_path)


@pytest.fixture
def toolkit(tmp_path: Path) -> Toolkit:
    return lambda *arguments, **options: run_toolkit(tmp_path, *arguments, **options)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small job that was run to its end, and its document; made once for all workers, and tests only read it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, printed = root / "finished", root / "finished.json"
    with FileLock(root / "finished.lock"):
        if not printed.exists():
            result = run_toolkit(write_job(folder), "run", "tiny", "--json", "--precision", "int8")
            assert result.returncode == 0, result.stderr
            printed.write_text(result.stdout)
    return folder, json.loads(printed.read_text())


@pytest.fixture
def finished_copy(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the finished job that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder, symlinks=True)
    return folder


def image_folder(root: Path, counts: dict[str, dict[str, int]], size: int = 20) -> Path:
    """Write an image folder: split → class → number of images; a class is a brightness."""
    random = np.random.default_rng(0)
    for split, classes in counts.items():
        for level, (name, count) in enumerate(sorted(classes.items())):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 60, (size, size + index % 3, 3)) + 60 * level
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")
    return root
