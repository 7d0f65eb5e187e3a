"""The whole job with TensorRT, on a machine that stand-ins make a server with an A100."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import jsonschema
import numpy as np
import pytest

from tests.conftest import run_toolkit
from tests.nvidia import A100, STANDINS, environment
from toolkit.report.document import SCHEMA as SCHEMA_FILE

SCHEMA = json.loads(SCHEMA_FILE.read_text())
TARGET = """\
profile: tiny
arch: x86_64
compute_capability: sm_80
runtime: tensorrt
build: {where: device, workspace: 1 GB}
"""
Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def server(finished_copy: Path, tmp_path: Path) -> Run:
    """Run the toolkit on the server; ``parts`` are the stand-ins that its Python finds, ``version`` TensorRT's."""
    (finished_copy / "targets" / "server.yaml").write_text(TARGET)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\necho '{A100['name']}, 8.0, 40960'\n")
    (tools / "nvidia-smi").chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(
        *arguments: str, version: str = "10.3", parts: tuple[str, ...] = ("tensorrt_api", "cuda_python")
    ) -> Any:
        env = environment(version, A100, *parts) | {"PATH": path}
        if "tensorrt_api" in parts:
            site = tmp_path / version
            (site / f"tensorrt-{version}.0.dist-info").mkdir(parents=True, exist_ok=True)
            (site / f"tensorrt-{version}.0.dist-info" / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: tensorrt\nVersion: {version}.0\n"
            )
            env["PYTHONPATH"] += f"{os.pathsep}{site}"
        else:
            env |= {"TRTEXEC": str(STANDINS / "trtexec"), "TRTEXEC_STANDIN": version}
        env["PYTHONPATH"] += f"{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        return run_toolkit(finished_copy, arguments[0], "server", *arguments[1:], env=env)

    return run


@pytest.mark.parametrize("library", ["cuda_python", "pycuda"])
def test_from_training_to_a_committed_release(server: Run, finished_copy: Path, library: str) -> None:
    result = server("run", "--precision", "fp16", "--json", parts=("tensorrt_api", library))
    assert result.returncode == 0, result.stderr
    run = json.loads(result.stdout)
    jsonschema.validate(run, SCHEMA)
    assert run["engine"]["provider"] == "TensorRT 10.3.0.30"
    assert run["engine"]["fingerprint"]["gpu"] == A100["name"]
    assert run["bench"]["layers"]["checked"] == 20
    assert run["bench"]["layers"]["other"] == {}
    assert run["bench"]["settings"]["cuda"] == library.replace("_", "-")
    assert run["bench"]["agreement"]["top1"] > 0.95
    assert run["commit"]["committed"]
    assert (finished_copy / "build" / "devices" / "server" / "current" / "model.engine").is_file()
    assert list((finished_copy / "build" / "store" / ".timing").glob("*.timing.cache"))
    page = (finished_copy / run["report"]).read_text()
    assert "TensorRT 10.3.0.30" in page
    np.save(finished_copy / "image.npy", np.zeros((3, 16, 16), np.uint8))
    predicted = server("predict", "image.npy", parts=("tensorrt_api", library))
    assert predicted.returncode == 0, predicted.stderr
    assert len(predicted.stdout.split(",")) == 5


def test_another_tensorrt_makes_another_engine(server: Run) -> None:
    first = json.loads(server("build", "--precision", "fp16", "--json").stdout)
    second = json.loads(server("build", "--precision", "fp16", "--json", version="10.16").stdout)
    assert first["artifacts"]["quantize"] == second["artifacts"]["quantize"]
    assert first["artifacts"]["build"] != second["artifacts"]["build"]
    assert second["engine"]["provider"].startswith("TensorRT 10.16")


def test_trtexec_measures_latency_and_says_what_it_cannot(server: Run, finished_copy: Path) -> None:
    result = server("run", "--precision", "fp16", "--json", parts=("cuda_python",))
    assert result.returncode == 1
    run = json.loads(result.stdout)
    jsonschema.validate(run, SCHEMA)
    assert run["engine"]["fingerprint"]["version"].startswith("10.3.0")
    assert run["bench"]["latency_ms"]["p50"]["value"] > 0
    assert run["bench"]["settings"]["tool"] == "trtexec"
    assert run["bench"]["accuracy"] is None
    assert run["verdict"]["status"] == "undecided"
    (drop,) = [line for line in run["verdict"]["lines"] if line["what"] == "accuracy drop"]
    assert "trtexec measures latency only" in drop["reason"]
    assert not run["commit"]["committed"]
    assert "trtexec measures latency only" in (finished_copy / run["report"]).read_text()


def test_the_health_check_runs_a_plan_with_trtexec_where_python_cannot(server: Run, finished_copy: Path) -> None:
    profile = finished_copy / "profiles" / "tiny.yaml"
    profile.write_text(profile.read_text().replace("max_accuracy_drop: 100 %, ", ""))
    result = server("run", "--precision", "fp16", "--json", parts=("cuda_python",))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["commit"]["committed"]
    root = finished_copy / "build" / "devices" / "server"
    current = (root / "current").resolve().name
    (root / "current").unlink()
    result = server("rollback", "--to", current, parts=("cuda_python",), version="10.16")
    assert result.returncode == 1
    assert f"release {current} does not run" in result.stderr
    assert "no release is current, as before" in result.stderr
    result = server("rollback", "--to", current, parts=("cuda_python",))
    assert result.returncode == 0, result.stderr
    assert (root / "current").resolve().name == current
    np.save(finished_copy / "image.npy", np.zeros((3, 16, 16), np.uint8))
    result = server("predict", "image.npy", parts=("cuda_python",))
    assert result.returncode == 1
    assert "TensorRT cannot be imported by this Python" in result.stderr
    assert "python3-libnvinfer" in result.stderr


def test_int8_is_checked_layer_by_layer(server: Run) -> None:
    result = server("build", "--precision", "int8", "--json")
    assert result.returncode == 0, result.stderr
    run = json.loads(result.stdout)
    assert run["engine"]["precision"] == "int8"


def test_an_engine_from_elsewhere_that_does_not_fit_is_rebuilt_on_request(server: Run, finished_copy: Path) -> None:
    """The engine comes from this machine's TensorRT for RTX, for another GPU than the device's."""
    target = finished_copy / "targets" / "server.yaml"
    target.write_text(
        "profile: tiny\narch: x86_64\ncompute_capability: sm_80\nruntime: tensorrt-rtx\n"
        "build: {compute_capabilities: [sm_89]}\n"
    )
    result = server("run", "--precision", "fp16")
    assert result.returncode == 1
    assert "the engine does not fit this machine: built for sm_89, the device has sm_80" in result.stderr
    assert "--rebuild-stale" in result.stderr
    result = server("run", "--precision", "fp16", "--rebuild-stale")
    assert result.returncode == 1
    assert "does not fit this machine: built for sm_89, the device has sm_80; building it there" in result.stderr
    assert "hint: correct the target: toolkit targets show server" in result.stderr
