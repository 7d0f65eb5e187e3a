"""The whole job where its contract is not simply kept: undecided, measured on, worse than what is current."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jsonschema
import pytest

from tests.conftest import PROFILE, job_of, run_toolkit, write_job
from tests.test_run import SCHEMA, Finished, states
from toolkit import files, networks
from toolkit.stages import Runner
from toolkit.store import Artifact, Store

TINY = ("tiny", "--precision", "int8")


def few(limit: str) -> str:
    """A profile whose queries do not support a p99, with so much time to go on measuring."""
    usual = "duration: 100 ms, queries: 800, rounds: 1"
    assert usual in PROFILE
    return PROFILE.replace(usual, f"duration: 3 ms, queries: 3, time_limit: {limit}")


def run(folder: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    result = run_toolkit(folder, "run", *(arguments or TINY), "--json")
    assert result.returncode == code, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    jsonschema.validate(document, SCHEMA)
    return document


def p99(document: dict[str, Any]) -> dict[str, Any]:
    (line,) = [line for line in document["verdict"]["lines"] if line["what"] == "latency p99"]
    return dict(line)


def test_too_few_queries_leave_a_percentile_undecided(finished_copy: Path) -> None:
    write_job(finished_copy, few("1 ms"))
    document = run(finished_copy, code=1)
    assert document["verdict"]["status"] == p99(document)["status"] == "undecided"
    assert p99(document)["measured"] is None
    assert p99(document)["reason"].startswith(f"{document['bench']['samples']} queries, and p99 needs ")
    assert "undecided" in document["commit"]["reason"]
    printed = run_toolkit(finished_copy, "run", *TINY)
    assert printed.returncode == 1
    assert "contract  UNDECIDED" in printed.stdout
    assert "UNDECIDED  latency p99" in printed.stdout


def test_an_undecided_contract_is_measured_on(finished_copy: Path) -> None:
    write_job(finished_copy, few("100 s"))
    document = run(finished_copy)
    assert document["verdict"]["passed"]
    rounds = document["bench"]["rounds"]
    lengths = [
        sum(entry["queries"] for entry in measured["scenarios"] if entry["name"] == "SingleStream")
        for measured in rounds
    ]
    assert len(rounds) > 3
    assert sum(lengths) == document["bench"]["samples"] >= 368, "fewer do not support p99 at 95 %"
    assert lengths[-1] > lengths[0]
    assert all(states(run(finished_copy)).values())


def test_a_release_that_is_slower_than_the_current_one_does_not_replace_it(
    finished_copy: Path, finished: Finished
) -> None:
    write_job(finished_copy, PROFILE.replace("contract: {", "contract: {max_regression: 3 %, "))
    current = finished[1]["commit"]["release"]
    document = run(finished_copy, "tiny", "--precision", "fp32", code=1)
    (line,) = [line for line in document["verdict"]["lines"] if not line["passed"]]
    assert (line["what"], line["status"]) == ("regression", "failed")
    assert line["low"] > 0.03
    assert "above the limit of 3.00%" in line["reason"]
    assert document["bench"]["regression"]["against"] == current == document["commit"]["current"]
    assert Path(document["report"]).is_relative_to("build")
    assert document["bench"]["regression"]["sentence"] in (finished_copy / document["report"]).read_text()
    assert states(run(finished_copy, "tiny", "--precision", "fp32", code=1))["compare"]


def test_two_engines_in_turns(finished_copy: Path, finished: Finished) -> None:
    result = run_toolkit(finished_copy, "compare", *TINY, "--against", "baseline", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["release"] == finished[1]["commit"]["release"] != found["against"]
    assert found["significant"]
    assert found["ratio"]["high"] < 1, "int8 is faster than the unpruned network in fp32"
    printed = run_toolkit(finished_copy, "compare", *TINY, "--against", found["against"][:8])
    assert printed.stdout == f"release {found['release']} beside {found['against']}: {found['sentence']}\n"
    assert "compare   reused from" in printed.stderr
    for against, message in (
        ("current", f"release {found['release']} is the one to compare"),
        ("ffff", "no release on this machine is called 'ffff'"),
    ):
        refused = run_toolkit(finished_copy, "compare", *TINY, "--against", against)
        assert refused.returncode == 2
        assert message in refused.stderr
    refused = run_toolkit(finished_copy, "compare", *TINY, "--hosts", "a,b")
    assert refused.returncode == 2
    assert "two engines are compared on one device" in refused.stderr


def test_fine_tuning_leaves_half_of_the_drop_to_a_lower_precision(tmp_path: Path) -> None:
    profile = files.load_profile("host-cpu")
    contract = profile.contract.model_copy(update={"max_accuracy_drop": 0.02, "min_accuracy": None})
    profile = profile.model_copy(update={"contract": contract})
    job = job_of(tmp_path, profile=profile, until_contract=True)
    assert (job.enough(0.9), job.quantization_drop) == (pytest.approx(0.88), None)
    job = replace(job, precision="int8")
    assert (job.enough(0.9), job.quantization_drop) == (pytest.approx(0.89), 0.01)


def test_weights_taken_as_they_are_say_what_suffices(tmp_path: Path) -> None:
    asked = {}

    def make(name: str, config: dict[str, Any], *_: Any, **__: Any) -> Artifact:
        asked[name] = config
        return replace(Artifact.pending(name), meta={"history": [], "val": 0.9} if name == "train" else {})

    stages = SimpleNamespace(make=make, store=Store(tmp_path), writes=False)
    networks.shrink(job_of(tmp_path, until_contract=True), cast(Runner, stages))
    assert asked["finetune"]["enough"] == pytest.approx(0.88)


def test_fine_tuning_may_end_when_its_accuracy_suffices(finished_copy: Path) -> None:
    document = run(finished_copy, *TINY, "--until", "contract")
    (line,) = [stage["text"] for stage in document["stages"] if stage["name"] == "finetune"]
    assert "suffices" in line, "any accuracy is within 100 % of the unpruned network's"
    write_job(finished_copy, PROFILE.replace("max_accuracy_drop: 100 %, ", ""))
    refused = run_toolkit(finished_copy, "run", *TINY, "--until", "contract")
    assert refused.returncode == 2
    assert "asks for no accuracy, so that none suffices" in refused.stderr
