"""Networks made on a Ray cluster: what travels, the same results as here, Ctrl-C, no cluster there."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import image_folder, job_of, run_toolkit
from toolkit import cluster
from toolkit.compression import data, sources
from toolkit.errors import StageError, UsageError
from toolkit.workload import Model

needs_ray = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("ray", "grpc")), reason="Ray is not installed: extra 'ray'"
)

# where all cores are busy, Ray takes longer to start a process than its 30 s allow for
PATIENT = {"RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "300", "RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "60"}
# gRPC's handlers of a fork end some of what the head forks before it is another program
HEAD = PATIENT | {"GRPC_ENABLE_FORK_SUPPORT": "0", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Ray:
    """A cluster of one machine; ``home`` is its home folder, where its store is."""

    address: str
    home: Path

    @property
    def store(self) -> Path:
        return self.home / ".cache" / "edge-toolkit" / "store"


@pytest.fixture(scope="session")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    home = tmp_path_factory.mktemp("ray")
    gcs, client, environments = _free_ports(3)
    log = home / "log"
    with log.open("w") as output:
        started = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--no-monitor",
             "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}",
             f"--runtime-env-agent-port={environments}", "--min-worker-port=0", "--max-worker-port=0",
             "--num-cpus=2", "--num-gpus=0", "--object-store-memory=100000000", "--include-dashboard=false",
             "--include-log-monitor=false", "--disable-usage-stats", "--temp-dir", tmp_path_factory.mktemp("r")],
            env=os.environ | HEAD | {"HOME": str(home)}, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while "Ray runtime started" not in log.read_text():
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield Ray(f"ray://127.0.0.1:{client}", home)
    finally:
        started.terminate()  # ends all that it has started
        started.wait(60)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_a_job_has_the_same_keys_where_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, away = tmp_path / "here", tmp_path / "away"
    image_folder(here / "images", {"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 1}})
    (here / "sent_parts.py").write_text("width = 8\n")
    (here / "sent_model.py").write_text("import sent_parts\n\ndef build(classes): ...\n")
    (here / "best.pth").write_bytes(b"weights")
    monkeypatch.chdir(here)
    teacher = Model.parse_teacher(f"resnet20={here / 'best.pth'}")
    job = job_of(
        here / "build", f"imagefolder:{here / 'images'}", model=Model.parse("sent_model:build"), teacher=teacher
    )
    keys = data.fingerprint(job.data, here / "index", remember=False), sources.identify(job.model)
    assert "content" in keys[0]

    cluster.stage(job, away)
    sent = cluster.there(job)
    shutil.rmtree(here / "images")
    (here / "best.pth").unlink()
    (here / "sent_parts.py").unlink()
    monkeypatch.chdir(away)
    monkeypatch.syspath_prepend(away)
    assert (data.fingerprint(sent.data, away / "index", remember=False), sources.identify(sent.model)) == keys
    assert sent.teacher
    assert Path(str(sent.teacher.weights)).read_bytes() == b"weights"
    assert (away / "toolkit" / "cluster.py").is_file()


@pytest.mark.parametrize(
    ("resources", "parallel", "cores", "gpus"),
    [
        ([{"CPU": 8.0}], 1, 8, 0),
        ([{"CPU": 8.0}, {"CPU": 4.0}, {"memory": 1.0}], 2, 2, 0),
        ([{"CPU": 2.0}], 8, 1, 0),
        ([{"CPU": 32.0, "GPU": 4.0}], 4, 8, 1),
        ([{"CPU": 32.0, "GPU": 1.0}], 4, 8, 0.25),
        ([{"CPU": 32.0, "GPU": 4.0}], 3, 10, 1),
    ],
)
def test_a_network_gets_its_share_of_the_smallest_machine(
    resources: list[dict[str, float]], parallel: int, cores: int, gpus: float
) -> None:
    nodes = [{"Alive": True, "Resources": one} for one in resources]
    nodes.append({"Alive": False, "Resources": {"CPU": 1.0}})
    assert cluster.share(nodes, parallel) == {"num_cpus": cores, "num_gpus": gpus}


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with (
        pytest.raises(UsageError, match="not installed: grpc") as told,
        cluster.connected("ray://head:10001", 1, job_of(tmp_path)),
    ):
        pass
    assert "pip install -e '.[ray]'" in str(told.value.hint)


@needs_ray
def test_a_cluster_that_is_not_there(job: Path) -> None:
    (port,) = _free_ports(1)
    soon = {"RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "1", "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "1"}
    result = run_toolkit(job, "sweep", "tiny", "--ray", f"ray://127.0.0.1:{port}", env=soon)
    assert result.returncode == 1, result.stderr
    assert (
        f"no connection to the Ray cluster at ray://127.0.0.1:{port}: ray client connection timeout"
        in result.stderr
    )
    assert "Traceback" not in result.stderr
    assert not (job / "build" / "store" / "train").exists()


@needs_ray
def test_a_cluster_that_is_too_busy_says_so_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionAbortedError(
            "Initialization failure from server:\nTraceback (most recent call last):\n"
            '  File "proxier.py", line 780, in Datapath\n    raise RuntimeError(\n'
            "RuntimeError: Proxy failed to Connect to backend! Check `ray_client_server.err` on the head node.\n"
        )

    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(StageError, match=r"server: Proxy failed to Connect to backend! Check .* head node$") as told,
        cluster.connected("ray://head:10001", 1, job_of(tmp_path)),
    ):
        pass
    assert "TIMEOUT_S=300" in str(told.value.hint)


@needs_ray
@pytest.mark.parametrize("failures", [2, 3])
def test_a_server_that_the_head_could_not_start_is_asked_for_again(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    said = "RuntimeError: Starting Ray client server failed. See ray_client_server_23008.err for detailed logs.\n"
    answers = iter([ConnectionAbortedError(f"Initialization failure from server:\nTraceback:\n{said}")] * failures)
    asked = []

    def start(*given: object, **_: object) -> None:
        asked.append(given)
        for error in answers:
            raise error

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "nodes", list)
    refused = (
        pytest.raises(StageError, match="Starting Ray client server failed") if failures == 3 else nullcontext()
    )
    with refused, cluster.connected("ray://head:10001", 1, job_of(tmp_path)):
        pass
    assert len(asked) == 3


@needs_ray
def test_a_cluster_makes_what_this_machine_makes_and_continues_after_ctrl_c(
    finished: tuple[Path, dict[str, Any]], finished_copy: Path, ray: Ray
) -> None:
    arguments = ["sweep", "tiny", "--flops", "80%,70%", "--ray", ray.address, "--parallel", "2", "--json"]
    for stage in ("prune", "finetune", "export"):
        shutil.rmtree(finished_copy / "build" / "store" / stage)
    begun = subprocess.Popen(
        [sys.executable, "-m", "toolkit", *arguments],
        cwd=finished_copy, env=os.environ | PATIENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(ray.store.glob(".resume/finetune-*")):
        assert begun.poll() is None, begun.communicate()[1]
        time.sleep(0.1)
    begun.send_signal(signal.SIGINT)
    _, told = begun.communicate(timeout=120)
    assert begun.returncode == 130, told
    assert "the same command continues" in told
    assert "Traceback" not in told

    result = run_toolkit(finished_copy, *arguments, env=PATIENT)
    assert result.returncode == 0, result.stderr
    assert "70% fastnas: export made" in result.stderr
    assert [one["error"] for one in json.loads(result.stdout)["candidates"]] == [None, None]
    here, there = artifacts(finished[0]), artifacts(finished_copy)
    assert len([stage for stage, _ in here if stage == "finetune"]) == 1
    assert here == {name: there.get(name) for name in here}


def artifacts(folder: Path) -> dict[tuple[str, str], str]:
    """Return the digest of each artifact up to the graph, by stage and key."""
    found = {}
    for stage in ("data", "check", "train", "prune", "finetune", "export", "quantize"):
        for path in (folder / "build" / "store" / stage).glob("*/artifact.json"):
            found[stage, path.parent.name] = json.loads(path.read_text())["digest"]
    return found
