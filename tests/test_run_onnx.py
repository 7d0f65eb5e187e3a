"""The whole job for a user who has only an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from tests.conftest import PROFILE, run_toolkit, write_job
from tests.test_adopt import SIZE, network
from tests.test_run import SCHEMA, STAGES, Finished, states

NORMALISED = ("--mean", "0.5", "--std", "0.25")


def artifact(finished: Finished, stage: str) -> Path:
    return finished[0] / "build" / "store" / stage / finished[1]["artifacts"][stage]


def run(folder: Path, *arguments: str, code: int = 0, verb: str = "run") -> dict[str, Any]:
    result = run_toolkit(folder, verb, "tiny", *arguments, "--json")
    assert result.returncode == code, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_what_a_run_exported_is_as_accurate_on_its_own(finished: Finished, finished_copy: Path) -> None:
    """The exported graph takes bytes and brings its preprocessing: nothing is asked for."""
    path = artifact(finished, "export") / "model.onnx"
    found = run(finished_copy, "--model", f"onnx:{path}", "--data", "digits", "--precision", "int8")
    jsonschema.validate(found, SCHEMA)
    assert [stage["name"] for stage in found["stages"]] == STAGES
    assert set(found["artifacts"]) == set(STAGES) - {"check", "train", "prune", "finetune", "push", "compare"}
    assert found["bench"]["accuracy"] == finished[1]["bench"]["accuracy"]
    assert found["bench"]["agreement"]["top1"] == finished[1]["bench"]["agreement"]["top1"] > 0.9
    assert found["budget"] is None
    assert found["model"] == {"baseline": None, "pruned": None, "final": None}
    assert found["commit"]["committed"]
    (line,) = [line for line in found["verdict"]["lines"] if line["what"] == "accuracy drop"]
    drop = finished[1]["model"]["final"]["accuracy"] - finished[1]["bench"]["accuracy"]
    assert line["measured"] == pytest.approx(drop), "counted from the file itself in fp32"


def test_a_network_as_pytorch_exports_it_needs_its_normalisation(finished: Finished, finished_copy: Path) -> None:
    import torch

    from toolkit.compression import models
    from toolkit.workload import Model

    tuned = models.restore(Model.parse("resnet20"), 10, artifact(finished, "finetune") / "model.pth").eval()
    torch.onnx.export(
        tuned, (torch.zeros(1, 3, 16, 16),), str(finished_copy / "net.onnx"), opset_version=17, dynamo=False
    )
    refused = run_toolkit(finished_copy, "run", "tiny", "--model", "onnx:net.onnx")
    assert refused.returncode == 2
    assert "does not say how its pixels are normalised" in refused.stderr
    data = json.loads((artifact(finished, "data") / "artifact.json").read_text())["meta"]
    mean, std = (",".join(map(str, data[name])) for name in ("mean", "std"))
    found = run(finished_copy, "--model", "onnx:net.onnx", "--data", "digits", "--mean", mean, "--std", std)
    assert found["bench"]["accuracy"] == finished[1]["model"]["final"]["accuracy"]
    assert found["bench"]["agreement"]["top1"] == 1
    assert [row["batch"] for row in found["bench"]["batches"]] == [1, 4], "its batch of 1 became dynamic"


def test_without_labels_an_accuracy_clause_is_undecided_and_everything_is_kept(finished_copy: Path) -> None:
    network(finished_copy / "net.onnx")
    arguments = ("--model", "onnx:net.onnx", "--data", "none", *NORMALISED)
    found = run(finished_copy, *arguments, code=1)
    jsonschema.validate(found, SCHEMA)
    assert (found["verdict"]["status"], found["verdict"]["passed"]) == ("undecided", False)
    undecided = [line for line in found["verdict"]["lines"] if line["status"] == "undecided"]
    assert [(line["what"], line["reason"]) for line in undecided] == [
        ("accuracy drop", "not measured: the data have no labels")
    ]
    assert found["bench"]["accuracy"] is None
    assert found["bench"]["agreement"]["top1"] == 1
    assert found["bench"]["agreement"]["max_absolute"] < 1e-3
    assert not found["commit"]["committed"]
    assert "undecided" in found["commit"]["reason"]
    release = finished_copy / "build" / "devices" / "tiny" / "releases" / found["commit"]["release"]
    assert not (release / "evaluation" / "labels.npy").exists()
    assert (release / "evaluation" / "images.npy").is_file()
    page = (finished_copy / found["report"]).read_text()
    assert "The contract is undecided" in page
    assert "the data have no labels" in page
    assert "neither trained nor pruned here" in page
    assert "is undecided" in (finished_copy / found["report"]).with_suffix(".md").read_text()
    assert states(run(finished_copy, *arguments, code=1)) == dict.fromkeys(STAGES, True)
    assert all(stage["cached"] for stage in run(finished_copy, *arguments, verb="plan")["stages"])
    words = run_toolkit(finished_copy, "run", "tiny", *arguments)
    assert "contract  UNDECIDED" in words.stdout
    assert "same top-1 as ONNX Runtime fp32 on 100.0%" in words.stderr


def test_there_is_nothing_to_train(job: Path) -> None:
    network(job / "net.onnx")
    result = run_toolkit(job, "train", "tiny", "--model", "onnx:net.onnx", "--data", "none", *NORMALISED)
    assert result.returncode == 0
    assert "train     not needed: the model is an ONNX file" in result.stderr


def test_int8_is_calibrated_on_the_users_inputs_and_a_fixed_batch_is_kept(finished_copy: Path) -> None:
    write_job(finished_copy, PROFILE.replace("max_accuracy_drop: 100 %, ", ""))
    network(finished_copy / "net.onnx", shape=(1, 3, SIZE, SIZE), hard_batch=1)
    np.save(finished_copy / "in.npy", np.random.default_rng(0).integers(0, 256, (30, SIZE, SIZE, 3), np.uint8))
    arguments = ("--model", "onnx:net.onnx", "--data", "inputs:in.npy", "--precision", "int8", *NORMALISED)
    result = run_toolkit(finished_copy, "run", "tiny", *arguments)
    assert result.returncode == 0, result.stderr
    assert "batch 1 only" in result.stderr
    assert "calibrated on 15 images" in result.stderr
    found = run(finished_copy, *arguments)
    assert (found["bench"]["accuracy"], found["bench"]["images"]) == (None, 15)
    assert [row["batch"] for row in found["bench"]["batches"]] == [1]
    assert found["engine"]["precision"] == "int8"
    assert found["commit"]["committed"]
