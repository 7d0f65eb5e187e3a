from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import toolkit
from toolkit import config, containers, files
from toolkit.containers import ContainerEngine, images
from toolkit.errors import StageError

DOCKER = ContainerEngine("docker", "docker", "linux/amd64", "1000:1001", False, False, None, "/var/lib/docker")
PODMAN = ContainerEngine("podman", "podman", "linux/amd64", "1000:1001", True, False, None, "/home/me/storage")


def target(name: str, **changes: Any) -> config.Target:
    return files.load_target(name).model_copy(update=changes)


def command(engine: ContainerEngine, **changes: Any) -> list[str]:
    wanted: dict[str, Any] = {"mounts": ["/data"], "gpu": False, "name": "toolkit-1", "home": "/data/home"}
    return containers.run_command(engine, "image:1", ["python3", "agent.pyz", "facts"], **wanted | changes)


def engine_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, info: dict[str, Any], code: int = 0
) -> None:
    """Put a command into PATH that answers ``info`` with a document, in the place of an engine that is not here."""
    program = folder / name
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(info)}\nEND\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("TOOLKIT_CONTAINER_ENGINE", name)


DOCKER_INFO = {"Architecture": "x86_64", "DockerRootDir": "/var/lib/docker", "Runtimes": {"runc": {}}}


# --- which image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "facts", "base", "tensorrt", "sure"),
    [
        ("t4", {}, "nvcr.io/nvidia/tensorrt:26.05-py3", "10.16", "secondary"),
        ("a100", {"arch": "x86_64"}, "nvcr.io/nvidia/tensorrt:26.05-py3", "10.16", "secondary"),
        ("jetson-orin", {"l4t": "35.4.1"}, "nvcr.io/nvidia/l4t-tensorrt:r8.5.2.2-devel", "8.5.2.2", "secondary"),
        ("jetson-orin", {"l4t": "36.3.0"}, "nvcr.io/nvidia/l4t-tensorrt:r8.6.2-devel", "8.6.2", "secondary"),
        ("jetson-orin-nano", {"l4t": "36.4.3"}, "nvcr.io/nvidia/l4t-tensorrt:r10.3.0-devel", "10.3.0", "secondary"),
        ("jetson-thor", {"l4t": "38.4"}, "nvcr.io/nvidia/tensorrt:25.08-py3", "10.13", "unconfirmed"),
        ("jetson-orin", {"l4t": "39.2.0"}, "nvcr.io/nvidia/tensorrt:26.05-py3", "10.16", "unconfirmed"),
        ("host-cpu", {"arch": "aarch64"}, "docker.io/library/python:3.11-slim", None, None),
    ],
)
def test_the_image_that_fits(name: str, facts: dict[str, Any], base: str, tensorrt: str, sure: str) -> None:
    choice = images.image_for(target(name), facts)
    assert (choice.base, choice.tensorrt, choice.sure) == (base, tensorrt, sure)
    assert choice.build
    assert images.catalogue()[choice.build].tag == choice.image


def test_the_target_files_image_comes_first() -> None:
    choice = images.image_for(target("jetson-orin", image="mine:1"), {"arch": "x86_64", "gpus": []})
    assert (choice.image, choice.build) == ("mine:1", None)


@pytest.mark.parametrize(
    ("name", "facts", "words"),
    [
        ("a100", {"gpus": []}, "needs a GPU with sm_80, and this machine has none"),
        ("t4", {"gpus": [{"compute_capability": "sm_80"}]}, "needs a GPU with sm_75, and this machine has sm_80"),
        ("a100", {"arch": "aarch64"}, "is x86_64, and this machine is aarch64"),
        ("jetson-orin", {}, "depends on the JetPack of the device"),
        ("jetson-orin", {"l4t": "32.7.1"}, "no image is known for runtime tensorrt, arch aarch64, l4t 32.7.1"),
        ("jetson-orin", {"l4t": "36.41"}, "no image is known"),
    ],
)
def test_no_image_fits(name: str, facts: dict[str, Any], words: str) -> None:
    with pytest.raises(StageError, match=words) as caught:
        images.image_for(target(name), facts)
    assert caught.value.hint


def test_every_rule_names_an_image_and_says_how_sure_it_is() -> None:
    catalogue = images.catalogue()
    for rule in images.rules():
        assert rule["image"] in catalogue
        assert rule["runtime"] == "onnxruntime" or rule["sure"] in images.CERTAINTY


# --- the bake file -------------------------------------------------------------------------------------------


def test_the_bake_file_is_read_as_buildx_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_NGC", "mirror.example/nvidia")
    image = images.catalogue("abc")["engine-26.05"]
    assert image.base == "mirror.example/nvidia/tensorrt:26.05-py3"
    assert image.tag == f"edge-toolkit/engine:{toolkit.__version__}-26.05"
    assert image.labels["org.opencontainers.image.revision"] == "abc"
    assert image.labels["org.opencontainers.image.version"] == toolkit.__version__
    assert image.network == "default"
    assert image.arguments["CUDA"] == "13"


def test_the_bake_file_agrees_with_itself_and_with_the_package() -> None:
    import hcl2

    text = (images.folder() / "docker-bake.hcl").read_text()
    catalogue = images.catalogue()
    assert f'variable "TOOLKIT_VERSION" {{ default = "{toolkit.__version__}" }}' in text
    group = hcl2.loads(text)["group"][0]['"default"']["targets"]
    assert {name.strip('"') for name in group} == set(catalogue)
    assert len({image.tag for image in catalogue.values()}) == len(catalogue)
    for image in catalogue.values():
        assert image.dockerfile.is_file()


# --- the command ---------------------------------------------------------------------------------------------


def test_the_command_for_docker() -> None:
    assert " ".join(command(DOCKER)) == (
        "docker run --rm --interactive --init --name toolkit-1 --network none --user 1000:1001 "
        "--mount type=bind,source=/data,target=/data --env HOME=/data/home --env USER=toolkit "
        "--entrypoint python3 image:1 agent.pyz facts"
    )


def test_files_belong_to_who_calls() -> None:
    assert "--userns keep-id --user 1000:1001" in " ".join(command(PODMAN))
    rootless = ContainerEngine("docker", "docker", "linux/amd64", "1000:1001", True, True, None, "/")
    assert "--user 0:0 --security-opt label=disable" in " ".join(command(rootless))


def test_shared_memory_is_as_large_as_asked_for() -> None:
    assert "--shm-size" not in command(DOCKER)
    for engine in (DOCKER, PODMAN):
        line = command(engine, shared_memory="1g")
        assert line[line.index("--shm-size") + 1] == "1g"
        assert line.index("--shm-size") < line.index("image:1")


def test_a_path_with_a_comma_is_mounted() -> None:
    assert '"source=/a,b"' in command(DOCKER, mounts=["/a,b"])[command(DOCKER).index("--mount") + 1]


@pytest.mark.parametrize(("engine", "words"), [(DOCKER, "--runtime=docker"), (PODMAN, "nvidia-ctk cdi generate")])
def test_a_gpu_that_the_engine_cannot_give(engine: ContainerEngine, words: str) -> None:
    with pytest.raises(StageError, match="has no GPU support") as caught:
        command(engine, gpu=True)
    assert words in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("info", "probe", "options"),
    [
        ({"Runtimes": {"nvidia": {}}}, {}, "--gpus all"),
        ({"Runtimes": {"runc": {}}}, {"hook": "yes"}, "--gpus all"),
        ({"CDISpecDirs": ["/etc/cdi"]}, {"cdi": "yes"}, "--device nvidia.com/gpu=all"),
        ({"CDISpecDirs": ["/etc/cdi"]}, {}, None),
        ({"CDISpecDirs": None}, {"cdi": "yes"}, None),
        (
            {"Runtimes": {"nvidia": {}}},
            {"jetson": "yes"},
            "--runtime nvidia --env NVIDIA_VISIBLE_DEVICES=all --env NVIDIA_DRIVER_CAPABILITIES=all",
        ),
    ],
)
def test_how_docker_gives_gpus(info: dict[str, Any], probe: dict[str, str], options: str | None) -> None:
    assert containers._gpu_options("docker", info, probe) == (tuple(options.split()) if options else None)


def test_how_podman_gives_gpus() -> None:
    assert containers._gpu_options("podman", {}, {"cdi": "yes"}) == ("--device", "nvidia.com/gpu=all")
    assert containers._gpu_options("podman", {}, {"hook": "yes"}) is None


# --- which engine --------------------------------------------------------------------------------------------


def test_a_docker_with_a_gpu_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    security = ["name=seccomp,profile=default", "name=selinux"]
    info = DOCKER_INFO | {"Runtimes": {"nvidia": {}}, "SecurityOptions": security}
    engine_with(tmp_path, monkeypatch, "moby", info)
    engine = containers.find_engine()
    assert (engine.kind, engine.platform, engine.gpu) == ("docker", "linux/amd64", ("--gpus", "all"))
    assert (engine.selinux, engine.rootless) == (True, False)
    assert engine.user == f"{os.getuid()}:{os.getgid()}"


def test_podman_under_docker_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = {"arch": "arm64", "security": {"rootless": True, "selinuxEnabled": False}}
    engine_with(tmp_path, monkeypatch, "moby", {"host": host, "store": {"graphRoot": "/s"}})
    engine = containers.find_engine()
    assert (engine.kind, engine.platform, engine.rootless) == ("podman", "linux/arm64", True)


@pytest.mark.parametrize(
    ("problem", "message", "remedy"),
    [
        ("Got permission denied while trying to connect", "may not use moby", "usermod -aG docker"),
        ("Cannot connect to the Docker daemon", "moby does not answer", "systemctl start docker"),
    ],
)
@pytest.mark.parametrize("code", [0, 1])
def test_an_engine_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str, message: str, remedy: str, code: int
) -> None:
    engine_with(tmp_path, monkeypatch, "moby", {"ServerErrors": [problem]}, code)
    with pytest.raises(StageError, match=message) as caught:
        containers.find_engine()
    assert remedy in (caught.value.hint or "")


def test_no_engine_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CONTAINER_ENGINE", "no-such-engine")
    with pytest.raises(StageError, match="there is no no-such-engine") as caught:
        containers.find_engine()
    assert "apt-get install docker.io" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("code", "stderr", "words"),
    [
        (125, "docker: Error response from daemon: could not select device driver", "cannot give the GPU"),
        (
            125,
            "docker: Error: write /var/x: no space left on device.\nSee 'docker run --help'.",
            "no disk space left",
        ),
        (125, "docker: Error: boom.\nSee 'docker run --help'.", "could not run image:1: Error: boom"),
        (
            125,
            "Error: container-init binary not found on the host: stat /x/catatonit",
            "has no init for containers",
        ),
        (127, "[FATAL tini (7)] exec python3 failed: No such file or directory", "cannot run the program"),
        (1, "ERROR (catatonit:2): failed to exec pid1: No such file or directory", "cannot run the program"),
        (1, "exec /usr/bin/python3: exec format error", "is for another architecture than linux/amd64"),
    ],
)
def test_what_docker_refuses_is_a_sentence(code: int, stderr: str, words: str) -> None:
    error = containers.refused(DOCKER, "image:1", code, stderr)
    assert error
    assert words in error.message
    assert error.hint


def test_the_program_s_own_exit_is_no_refusal() -> None:
    assert containers.refused(DOCKER, "image:1", 1, "Traceback ...") is None
    assert containers.refused(DOCKER, "image:1", 0, "") is None


def test_the_reason_is_not_what_dockers_client_says_of_itself() -> None:
    stderr = (
        'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]]\n'
        'time="2026-11-21T18:46:58Z" level=error msg="error waiting for container: context canceled"\n'
    )
    error = containers.refused(DOCKER, "standin:1", 125, stderr)
    assert error is not None
    assert "cannot give the GPU to a container: Error response from daemon: could not select" in str(error)
