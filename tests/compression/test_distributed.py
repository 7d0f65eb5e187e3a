"""Training in several processes: real ones on the CPU, which agree by gloo as GPUs do by NCCL."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compression.test_training import images
from tests.conftest import PROFILE, run_toolkit, write_job
from toolkit.compression import distributed, models, training
from toolkit.compression.images import Hardware
from toolkit.config import Recipe
from toolkit.errors import StageError, UsageError
from toolkit.store import Work
from toolkit.workload import Model


class Small(nn.Module):
    """Without batch norm, whose statistics PyTorch unites on GPUs alone; with a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.hidden = nn.Conv2d(8, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8, 2)
        self.spare = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.relu(self.norm(self.hidden(self.conv(x)))).mean((2, 3)))
        return out


def fit(
    work: Work, *, batch: int = 16, epochs: int = 3, dies: int | None = None, fails: bool = False
) -> dict[str, Any]:
    """Train on 75 images, of which the last batch of 16 has 11, and keep the weights."""

    def loss(logits: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        nonlocal taken
        if distributed.rank() == 1 and taken == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if distributed.rank() == 1 and fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        taken += 1
        return nn.functional.cross_entropy(logits, labels)

    taken = 0
    torch.manual_seed(0)
    network, hardware = Small(), Hardware(torch.device("cpu"), bf16=False)
    result = training.fit(
        network,
        images(75, hardware),
        images(20, hardware),
        recipe=Recipe(batch=batch, crop=2),
        epochs=epochs,
        base_lr=0.1,
        seed=5,
        hardware=hardware,
        work=work,
        loss=loss,
    )
    if distributed.rank() == 0:
        torch.save(network.state_dict(), work.out / "weights.pt")
    return {"history": result.history, "processes": distributed.size()}


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs are counted, and the processes find none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def work_in(folder: Path) -> Work:
    (folder / "resume").mkdir(parents=True)
    return Work(folder, folder / "resume")


def assert_same(first: Path, second: Path) -> None:
    weights = (torch.load(folder / "weights.pt").values() for folder in (first, second))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("two")
def test_two_processes_come_to_the_result_of_one(tmp_path: Path) -> None:
    alone = distributed.run(None, fit, work_in(tmp_path / "one"))
    told: list[str] = []
    work = replace(
        work_in(tmp_path / "two"), progress=lambda done, total, text: told.append(f"{done}/{total} {text}")
    )
    together = distributed.run(2, fit, work)
    assert (alone["processes"], together["processes"], together["gpus"]) == (1, 2, 2)
    assert "gpus" not in alone
    assert [line.split(" ")[0] for line in told] == ["1/3", "2/3", "3/3"]
    for one, other in zip(alone["history"], together["history"], strict=True):
        assert one["val"] == other["val"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert alone["history"][0]["loss"] > 1.1 * alone["history"][-1]["loss"], "nothing was learnt"
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.usefixtures("two")
def test_a_killed_process_ends_the_training_which_one_alone_continues(tmp_path: Path) -> None:
    work = work_in(tmp_path / "two")
    with pytest.raises(StageError, match=r"trains on GPU 1 was killed \(SIGKILL\)") as error:
        distributed.run(2, fit, work, dies=7)
    assert "goes on after the last epoch" in str(error.value.hint)
    told: list[str] = []
    distributed.run(None, fit, replace(work, progress=lambda done, total, text: told.append(text)))
    assert told[0] == "continues after epoch 1"
    distributed.run(None, fit, work_in(tmp_path / "one"))
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.usefixtures("two")
def test_what_one_process_cannot_do_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="does not suffice for its 8 images of a batch") as error:
        distributed.run(2, fit, work_in(tmp_path), fails=True)
    assert "--gpus" in str(error.value.hint)


def alive(group: int) -> bool:
    """Whether a process of a group is left, other than one that only has to be waited for."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, owner = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(owner) == group and state != "Z":
            return True
    return False


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


COUNTED = "import torch\ntorch.cuda.device_count = lambda: 2\nif __name__ == '__main__':\n"
COMMAND = COUNTED + "    from toolkit.__main__ import main\n    main()\n"
WITHOUT_END = (
    COUNTED
    + "    from pathlib import Path\n"
    + "    from tests.compression import test_distributed as tests\n"
    + "    tests.distributed.run(2, tests.fit, tests.work_in(Path('work')), epochs=10**6)\n"
)


def begin(folder: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a program that counts two GPUs, in a process group of its own."""
    (folder / "program.py").write_text(code)
    env = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    return subprocess.Popen(
        [sys.executable, "program.py", *arguments],
        cwd=folder, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_ctrl_c_ends_every_process_and_loses_nothing(finished_copy: Path) -> None:
    folder = write_job(finished_copy, PROFILE.replace("epochs: 3", "epochs: 5", 1))
    store = folder / "build" / "store"
    shutil.rmtree(store / "train")
    begun = begin(folder, COMMAND, "train", "tiny", "--gpus", "2")
    wait_until(lambda: list(store.glob(".resume/train-*/checkpoint.pt")) or begun.poll() is not None)
    os.killpg(begun.pid, signal.SIGINT)  # as a terminal does
    _, told = begun.communicate(timeout=60)
    assert begun.returncode == 130, told
    assert "the same command continues" in told
    assert "Traceback" not in told
    wait_until(lambda: not alive(begun.pid))
    again = begin(folder, COMMAND, "train", "tiny", "--gpus", "all")
    _, told = again.communicate(timeout=400)
    assert again.returncode == 0, told
    (record,) = store.glob("train/*/artifact.json")
    assert json.loads(record.read_text())["meta"]["gpus"] == 2
    alone = run_toolkit(folder, "train", "tiny")
    assert alone.returncode == 0
    assert "train     reused" in alone.stderr


def test_nothing_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    begun = begin(tmp_path, WITHOUT_END)
    wait_until(lambda: (tmp_path / "work" / "resume" / "checkpoint.pt").exists() or begun.poll() is not None)
    assert begun.poll() is None
    begun.kill()
    begun.wait()
    wait_until(lambda: not alive(begun.pid))


def test_more_gpus_than_there_are_are_refused_before_anything_is_done(job: Path) -> None:
    result = run_toolkit(job, "run", "tiny", "--gpus", "3", env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 2
    assert "--gpus 3: PyTorch finds no GPU on this machine" in result.stderr
    assert "done in" not in result.stderr
    assert run_toolkit(job, "run", "tiny", "--gpus", "0").returncode == 2
    (job / "any.onnx").touch()
    result = run_toolkit(job, "run", "tiny", "--gpus", "2", "--model", "onnx:any.onnx")
    assert result.returncode == 2
    assert "leave out --gpus" in result.stderr


@pytest.mark.usefixtures("two")
def test_how_many_gpus_there_are_and_what_they_can_share() -> None:
    assert distributed.count("all") == distributed.count(2) == 2
    distributed.require("all", 64)
    with pytest.raises(UsageError, match="--gpus 3: PyTorch finds 2") as error:
        distributed.count(3)
    assert error.value.hint == "give --gpus 2, or all"
    for batch in (33, 2):
        with pytest.raises(UsageError, match=f"batch {batch} cannot be divided among 2 GPUs") as error:
            distributed.require(2, batch)
        assert str(error.value.hint).startswith("give --gpus 1,")


def test_the_shares_of_a_batch_are_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "size", lambda: 3)

    def shares(batch: slice) -> list[list[int]]:
        found = []
        for number in range(3):
            monkeypatch.setattr(distributed, "rank", lambda number=number: number)
            found.append(list(range(100))[distributed.share(batch)])
        return found

    assert shares(slice(24, 30)) == [[24, 25], [26, 27], [28, 29]]
    assert shares(slice(24, 28)) == [[24, 25, 26, 27]] * 3
    assert shares(slice(24, 27)) == [[24, 25, 26]] * 3, "one image has no statistics"


def test_synchronised_batch_norm_is_the_networks_own() -> None:
    network = models.build(Model.parse("resnet20"), 2, seed=5).eval()
    copied = distributed.synchronised(network)
    assert copied.training
    assert not network.training
    kinds = {type(module) for module in copied.modules()}
    assert nn.SyncBatchNorm in kinds
    assert nn.BatchNorm2d not in kinds
    assert nn.SyncBatchNorm not in {type(module) for module in network.modules()}
    own = network.state_dict(keep_vars=True)
    for key, tensor in copied.state_dict(keep_vars=True).items():
        assert tensor is own[key]
    inputs = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(copied.eval()(inputs), network(inputs))
