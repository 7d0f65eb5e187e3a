"""The images, built by a real docker on stand-in bases, and what runs in them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import run_toolkit, write_job
from tests.integration.conftest import SECRET, SLIM, build_base, docker
from tests.integration.measuring import measure
from toolkit import containers
from toolkit.containers import ContainerEngine, building, images
from toolkit.containers.images import Choice
from toolkit.devices.agent import Agent
from toolkit.devices.container import ContainerDevice
from toolkit.devices.local import LocalDevice
from toolkit.errors import StageError

pytestmark = pytest.mark.containers

BUILT = ("toolkit", "agent", "train", "engine-26.05", "jetson-r10.3.0")


@pytest.fixture(scope="module")
def bases(daemon: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The stand-in for every base: a slim Python."""
    build_base("amd64", tmp_path_factory.mktemp("base"))


def build_tensorrt(folder: Path) -> None:
    """Build the stand-in for TensorRT's images: the slim Python with TensorRT for RTX."""
    version = metadata.version("tensorrt-rtx-cu13")
    install = f"RUN pip install --no-cache-dir --break-system-packages tensorrt-rtx-cu13=={version}"
    (folder / "Dockerfile").write_text(f"FROM {SLIM}\n{install}\n")
    tags = ("standin/tensorrt:26.05-py3", "standin/l4t-tensorrt:r10.3.0-devel")
    docker("build", "--network", "host", "--tag", tags[0], "--tag", tags[1], str(folder))


@pytest.fixture(scope="module")
def built(bases: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.CompletedProcess[str]]:
    """`toolkit containers build`, and one of the images that are not for this architecture."""
    root = images.folder().parent
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setenv("TOOLKIT_TRAIN", images.catalogue()["toolkit"].tag)
        large = pool.submit(run_toolkit, root, "containers", "build", "toolkit", timeout=900)
        build_tensorrt(tmp_path_factory.mktemp("tensorrt"))
        building.build_image(containers.find_engine(), "jetson-r10.3.0", print)
        assert large.result().returncode == 0, large.result().stderr
        yield run_toolkit(root, "containers", "build", timeout=900)  # what is there comes from the cache


@pytest.fixture(scope="module")
def inside(built: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small job that was run to its end in the training image, and its document."""
    folder = write_job(tmp_path_factory.mktemp("inside"))
    result = run_toolkit(folder, "run", "tiny", "--in-container", "--json", timeout=600)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


@pytest.fixture
def engine(built: Any) -> ContainerEngine:
    return containers.find_engine()


@pytest.fixture
def device(engine: ContainerEngine, tmp_path: Path) -> Iterator[ContainerDevice]:
    (tmp_path / "device").mkdir()
    yield ContainerDevice(LocalDevice(tmp_path / "device"), engine, images.catalogue()["agent"].tag, gpu=False)
    assert not docker("ps", "--all", "--quiet"), "a container was left"


def test_build_makes_what_this_host_can_and_says_what_it_skipped(built: subprocess.CompletedProcess[str]) -> None:
    assert built.returncode == 0, built.stderr
    lines = dict(line.split(maxsplit=1) for line in built.stdout.splitlines() if "hint:" not in line)
    assert {name for name, text in lines.items() if text.startswith("built")} == set(BUILT[:4])
    assert lines["jetson-r8.5.2"] == "skipped: it is for linux/arm64, not for linux/amd64"


@pytest.mark.parametrize("name", BUILT)
def test_an_image_is_not_root_s_has_labels_a_health_check_and_no_secret(engine: ContainerEngine, name: str) -> None:
    tag = images.catalogue()[name].tag
    found = containers.inspect(engine, tag)
    assert found
    settings = found["Config"]
    labels = settings["Labels"]
    assert labels["org.opencontainers.image.version"] == tag.split(":")[1].split("-")[0]
    assert len(labels["org.opencontainers.image.revision"].removesuffix("-dirty")) == 40
    assert docker("run", "--rm", "--network", "none", "--entrypoint", "id", tag, "-u") == "10001"
    kind, *check = settings["Healthcheck"]["Test"]
    assert kind == "CMD"
    docker("run", "--rm", "--network", "none", "--entrypoint", check[0], tag, *check[1:])
    assert SECRET not in docker("history", "--no-trunc", tag)
    assert SECRET not in docker("run", "--rm", "--entrypoint", "sh", tag, "-c", "cat /etc/pip.conf || true")


@pytest.mark.parametrize("name", ["engine-26.05", "jetson-r10.3.0"])
def test_an_engine_image_has_what_the_agent_needs(engine: ContainerEngine, tmp_path: Path, name: str) -> None:
    inside = ContainerDevice(LocalDevice(tmp_path), engine, images.catalogue()[name].tag, gpu=False)
    lines: list[str] = []
    program = "import numpy, tensorrt_rtx, cuda.bindings.runtime; print(tensorrt_rtx.__version__)"
    finished = inside.run([inside.python, "-c", program], on_line=lines.append)
    assert finished.returncode == 0, finished.stderr
    assert metadata.version("tensorrt-rtx-cu13").startswith(lines[-1])


def test_the_agent_measures_in_the_image(device: ContainerDevice, tmp_path: Path) -> None:
    facts = device.facts()
    assert facts["container"].startswith(f"{device.image}@sha256:")
    assert set(facts["runtimes"]) == {"onnxruntime"}
    result = measure(device, tmp_path)
    assert result["images"] == 64
    assert np.load(tmp_path / "logits.npy").argmax(1).tolist() == [0, 1] * 32
    assert result["scenarios"][0]["queries"] >= 20


def test_files_belong_to_who_calls(device: ContainerDevice) -> None:
    os.chown(device.root, 1234, 1234)
    caller = ContainerDevice(device.inner, replace(device.engine, user="1234:1234"), device.image, gpu=False)
    program = "import os, pathlib; (pathlib.Path.home() / 'x').mkdir(parents=True)"
    assert caller.run([caller.python, "-c", program]).returncode == 0
    assert (Path(device.root) / "home" / "x").stat().st_uid == 1234


def test_a_program_that_takes_too_long_leaves_no_container(device: ContainerDevice) -> None:
    with pytest.raises(StageError, match="did not end within 3 s"):
        device.run(["sleep", "300"], timeout=3)


def test_a_full_disk_is_a_sentence(device: ContainerDevice, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", device.root], check=True)
    try:
        agent = Agent(device)
        manifest = {"id": "0" * 16, "files": {}}
        agent.ask("inventory", {"root": device.root, "manifest": manifest})
        agent.ask("install", {"root": device.root, "manifest": manifest})
        fill = ["dd", "if=/dev/zero", f"of={device.root}/full"]
        assert b"No space left" in subprocess.run(fill, capture_output=True).stderr
        with pytest.raises(StageError, match="No space left on device") as caught:
            agent.ask("install", {"root": device.root, "manifest": manifest})
        assert "free space" in (caught.value.hint or "")
    finally:
        subprocess.run(["umount", device.root], check=True)


def test_a_gpu_is_asked_of_a_docker_that_has_none(device: ContainerDevice) -> None:
    with pytest.raises(StageError, match="has no GPU support"):
        ContainerDevice(device.inner, device.engine, device.image, gpu=True).run(["true"])
    claimed = replace(device.engine, gpu=("--gpus", "all"))
    with pytest.raises(StageError, match=r"cannot give the GPU to a container: .*could not select device driver"):
        ContainerDevice(device.inner, claimed, device.image, gpu=True).run(["true"])


def test_an_image_that_cannot_be_had(engine: ContainerEngine) -> None:
    with pytest.raises(
        StageError, match=r"image localhost:1/none:1 is not there and cannot be pulled: .*refused"
    ) as caught:
        building.require_image(engine, Choice("localhost:1/none:1", "a test"), print)
    assert "login" in (caught.value.hint or "")
    with pytest.raises(StageError, match=r"its base standin/tensorrt:25.08-py3 cannot be pulled"):
        building.build_image(engine, "engine-25.08", print)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"etc/passwd": b""}, "cannot run the program"),
        # an ELF file of a machine that does not exist
        (
            dict.fromkeys(("bin/sh", "bin/python3"), b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xfe\xfe"),
            "architecture",
        ),
    ],
)
def test_an_image_that_cannot_run_python(
    device: ContainerDevice, tmp_path: Path, files: dict[str, bytes], words: str
) -> None:
    archive = tmp_path / "image.tar"
    with tarfile.open(archive, "w") as tar:
        for name, content in files.items():
            path = tmp_path / "file"
            path.write_bytes(content + bytes(64))
            path.chmod(0o755)
            tar.add(path, name)
    docker("import", str(archive), "standin/broken:1")
    broken = ContainerDevice(device.inner, device.engine, "standin/broken:1", gpu=False)
    with pytest.raises(StageError, match=words):
        Agent(broken).ask("facts", {"root": device.root})


def test_the_installed_toolkit_ships_its_images(engine: ContainerEngine) -> None:
    tag = images.catalogue()["toolkit"].tag
    shown = docker("run", "--rm", "--network", "none", tag, "toolkit", "containers", "list", "--json")
    assert set(json.loads(shown)["images"]) == set(images.catalogue())


def test_list_and_doctor(built: Any, tmp_path: Path) -> None:
    listed = json.loads(run_toolkit(tmp_path, "containers", "list", "--json").stdout)
    assert listed["targets"]["t4"]["image"] == listed["images"]["engine-26.05"]["tag"]
    fine = run_toolkit(tmp_path, "containers", "doctor", "host-cpu")
    assert fine.returncode == 0, fine.stdout
    assert "agent:" in fine.stdout
    assert "is there" in fine.stdout
    broken = run_toolkit(tmp_path, "containers", "doctor", "t4", "--json")
    assert broken.returncode == 1
    statuses = {check["name"]: check["status"] for check in json.loads(broken.stdout)}
    assert (statuses["engine"], statuses["gpu"]) == ("pass", "fail")
    absent = run_toolkit(tmp_path, "containers", "doctor", env={"DOCKER_HOST": "unix:///no/such/socket"})
    assert absent.returncode == 1
    assert "does not answer" in absent.stdout


def test_a_named_image_that_cannot_be_built_exits_with_1(built: Any, tmp_path: Path) -> None:
    result = run_toolkit(tmp_path, "containers", "build", "engine-25.08")
    assert result.returncode == 1
    assert "engine-25.08     failed: it is for linux/arm64" in result.stdout


def test_a_run_in_the_training_image(inside: tuple[Path, dict[str, Any]]) -> None:
    folder, document = inside
    assert document["commit"]["committed"]
    assert (folder / "build" / "store").is_dir()
    wrong = run_toolkit(folder, "run", "tiny", "--in-container", "--rerun", "train", "--flops", "1%")
    assert wrong.returncode == 2, wrong.stderr
    assert not docker("ps", "--all", "--quiet")


def test_an_interrupted_run_leaves_no_container(built: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "toolkit", "run", "tiny", "--in-container"]
    process = subprocess.Popen(command, cwd=write_job(tmp_path), start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not docker("ps", "--quiet"):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert not docker("ps", "--all", "--quiet")


@pytest.mark.parametrize(("name", "capability"), [("t4", "sm_75"), ("a100", "sm_80")])
def test_an_engine_is_built_in_the_container(
    inside: tuple[Path, dict[str, Any]], tmp_path: Path, name: str, capability: str
) -> None:
    """The engine image, with TensorRT for RTX in TensorRT's place."""
    target = f"""\
profile: tiny
arch: x86_64
compute_capability: {capability}
runtime: tensorrt-rtx
image: {images.catalogue()["engine-26.05"].tag}
build: {{where: container}}
"""
    folder = tmp_path / "copy"
    shutil.copytree(inside[0], folder, symlinks=True)
    write_job(folder, target=target)
    (folder / "targets" / "tiny.yaml").rename(folder / "targets" / f"{name}.yaml")
    result = run_toolkit(folder, "build", name, "--precision", "fp16", "--json", "-v")
    assert result.returncode == 0, result.stderr
    assert " run --rm " in result.stderr
    document = json.loads(result.stdout)
    fingerprint = document["engine"]["fingerprint"]
    assert fingerprint["compute_capability"] == [capability]
    assert "@sha256:" in fingerprint["container"]
    engine_file = folder / "build" / "store" / "build" / document["artifacts"]["build"] / "model.engine"
    assert engine_file.stat().st_size == document["engine"]["bytes"]
    assert not docker("ps", "--all", "--quiet"), "a container was left"
    planned = run_toolkit(folder, "plan", name, "--precision", "fp16")
    assert "docker run --rm" in planned.stdout
