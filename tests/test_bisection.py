"""The latency table on layers whose times are known, and the search for the largest budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.conftest import PROFILE, job_of, run_toolkit, write_job
from toolkit import bisection
from toolkit.bench import latency_table
from toolkit.bench.latency_table import Layer, Network
from toolkit.bisection import PROBES, STEPS, search
from toolkit.config import Flops
from toolkit.console import Console
from toolkit.errors import StageError
from toolkit.job import Job
from toolkit.report.document import FORMAT


@pytest.mark.parametrize("limit", range(-1, STEPS + 1))
@pytest.mark.parametrize("off", [0, -3, 4, 100, -100])
def test_the_search_finds_the_largest_step_or_says_that_there_is_none(limit: int, off: int) -> None:
    probed: list[int] = []

    def keeps(step: int) -> bool:
        probed.append(step)
        return step <= limit

    found = search(keeps, lambda: limit + off)
    assert len(probed) <= PROBES
    assert len(set(probed)) == len(probed)
    if limit < 0:
        assert found is None
    elif abs(off) <= 4:
        assert found == limit
    else:  # a guess that is far off may cost exactness
        assert found is not None
        assert limit - 4 <= found <= limit


def network(width: float, noise: float = 0.0, seed: int = 0) -> Network:
    """A network of four layers on a device that takes 5 µs a layer, 2 a MFLOP, and something for what it writes."""
    random = np.random.default_rng(seed)
    layers = []
    for inputs, outputs, pixels in ((16, 16, 1024), (16, 32, 256), (32, 64, 64), (64, 64, 64)):
        a, b = inputs * width, outputs * width
        flops = 2 * 9 * a * b * pixels
        us = 5 + 2 * flops / 1e6 + 1e-4 * b * pixels
        layers.append(Layer(flops, a, b, us * (1 + noise * random.normal())))
    total = sum(layer.us for layer in layers)
    return Network(f"{width}", layers, 0.0, 1.2 * total / 1000)


def test_the_table_knows_a_device_that_is_like_it() -> None:
    table = latency_table.fit([network(1.0), network(0.5)])
    unseen = network(0.75)
    assert table.predict(unseen) == pytest.approx(unseen.ms, rel=0.01)


def test_its_error_is_that_of_networks_it_has_not_seen() -> None:
    found = latency_table.errors([network(width, 0.05, seed) for seed, width in enumerate((1.0, 0.75, 0.5))])
    assert all(0 < abs(error) < 0.2 for error in found)


def test_a_network_of_the_same_widths_does_not_foretell_another() -> None:
    tuned = network(0.5, 0.05, 1)
    known = [network(1.0), network(0.5), tuned]
    assert tuned.others(known) == [known[0]]
    assert latency_table.errors(known)[2] == pytest.approx(latency_table.errors([known[0], tuned])[1])


def test_what_counts_against_a_layer_is_left_out() -> None:
    """The more a layer writes the faster it is here, which no cost below zero may explain."""
    layers = [Layer(1e6, 16, outputs, 100 - outputs) for outputs in (16.0, 32.0, 64.0)]
    cost = latency_table.fit([Network("odd", layers, 0.0, 1.0)]).cost
    assert (cost >= 0).all()
    assert cost.any()


def limited(job: Job, **clauses: float) -> Job:
    none = dict.fromkeys(("latency_p50", "latency_p90", "latency_p99", "throughput"))
    contract = job.profile.contract.model_copy(update=none | clauses)
    return replace(job, profile=job.profile.model_copy(update={"contract": contract}))


def measured(one: Network) -> dict[str, Any]:
    latency = {name: {"value": one.ms * factor} for name, factor in (("p50", 1), ("p90", 1.1), ("p99", 1.2))}
    return {"latency_ms": latency, "throughput": {"samples_per_s": {"value": 1000 / one.ms}}}


@pytest.mark.parametrize("clause", ["latency_p50", "latency_p99", "throughput"])
def test_the_first_guess_is_what_the_table_expects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clause: str
) -> None:
    whole, wanted = network(1.0), network(0.75)
    known = {"whole": whole, "half": network(0.5)}
    monkeypatch.setattr(bisection, "measured_networks", lambda job, runtime: known)
    limit = {"latency_p50": wanted.ms, "latency_p99": 1.2 * wanted.ms, "throughput": 1000 / wanted.ms}
    job = limited(job_of(tmp_path), **{clause: limit[clause]})
    budgets = [bisection.budget_at(step / STEPS, 20e6, 100e6) for step in range(STEPS + 1)]
    document = {
        "artifacts": {"bench": "whole"},
        "engine": {"runtime": "onnxruntime"},
        "bench": measured(whole),
        "verdict": {"status": "failed"},
    }
    step = bisection._guess(job, document, budgets, 100e6)
    assert budgets[step].value <= 0.75**2 * 100e6 < budgets[step + 1].value
    told = bisection._said(job, document)
    assert f"measured {whole.ms:.3f} ms (p50), contract failed" in told
    assert f"predicted {latency_table.fit([known['half']]).predict(whole):.3f} ms" in told
    known.clear()
    assert bisection._guess(job, document, budgets, 100e6) == STEPS // 2
    assert "predicted" not in bisection._said(job, document)


def test_only_what_was_measured_in_the_same_way_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"cpu": "that", "cores": 2}
    place = SimpleNamespace(device=SimpleNamespace(facts=lambda: facts))
    monkeypatch.setattr(bisection.pipeline, "destination", lambda job: place)
    monkeypatch.setattr(
        bisection.recorded, "artifact", lambda store, document, stage: SimpleNamespace(key=document["run"])
    )
    monkeypatch.setattr(latency_table, "read", lambda label, bench: network(1.0))
    alike = {"scenario": "SingleStream", "ran": {"threads": 1}, "device": {"cpu": "that"}}
    for run, bench in {
        "alike": alike,
        "threads": {**alike, "ran": {"threads": 2}},
        "scenario": {**alike, "scenario": "DutyCycle"},
        "device": {**alike, "device": {"cpu": "other"}},
    }.items():
        document = {
            "run": run,
            "format": FORMAT,
            "engine": {"runtime": "onnxruntime", "precision": "fp32"},
            "bench": bench,
            "model": {"final": {"flops": 1e6}},
        }
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "run.json").write_text(json.dumps(document))
    assert list(bisection.measured_networks(job_of(tmp_path), "onnxruntime")) == ["alike"]
    assert bisection.measured_networks(job_of(tmp_path), "openvino") == {}


def test_a_network_that_is_cut_alike_everywhere_is_what_it_would_be() -> None:
    cut, real = network(1.0).scaled(0.25), network(0.5)
    assert [layer.flops for layer in cut.layers] == [layer.flops for layer in real.layers]
    assert [layer.outputs for layer in cut.layers] == [layer.outputs for layer in real.layers]


def test_a_contract_without_limit_has_no_largest_budget(job: Path) -> None:
    profile = PROFILE.replace("latency_p99: 1 s, ", "")
    write_job(job, profile)
    result = run_toolkit(job, "run", "tiny", "--until", "latency")
    assert result.returncode == 2, result.stderr
    assert "limits neither latency nor throughput" in result.stderr


@pytest.mark.parametrize(
    ("limit", "guess", "says"),
    [
        (70, 10, "the largest budget that keeps the contract is 70M; now with fine-tuning"),
        (70, 14, "64M keeps the contract, 72M does not, nothing between was measured; now"),
        (40, 0, None),
    ],
)
def test_no_more_is_said_than_was_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: float,
    guess: int,
    says: str | None,
) -> None:
    def probe(job: Job, budget: Flops, console: Console) -> dict[str, Any]:
        passed = budget.value <= limit * 1e6
        line = {"what": "latency_p99", "status": "failed", "passed": passed, "reason": "too slow"}
        return {"verdict": {"passed": passed, "status": "", "lines": [line]}}

    ran = []
    monkeypatch.setattr(bisection, "PROBES", 5)
    monkeypatch.setattr(bisection, "reach", lambda job, console: (50e6, 90e6))
    monkeypatch.setattr(bisection, "probe", probe)
    monkeypatch.setattr(bisection, "_said", lambda job, document: "")
    monkeypatch.setattr(bisection, "_guess", lambda *_: guess)
    monkeypatch.setattr(bisection.runs, "execute", lambda job, *_: ran.append(str(job.budget)))
    job = limited(job_of(tmp_path), latency_p99=1.0)
    if says is None:
        with pytest.raises(StageError, match="no budget keeps the contract on the device: at 50M"):
            bisection.largest(job, Console())
    else:
        bisection.largest(job, Console())
        assert says in capsys.readouterr().err
        assert says.startswith(ran[0]) or f"is {ran[0]};" in says


def test_the_whole_network_is_the_largest_where_it_keeps_the_contract(finished_copy: Path) -> None:
    result = run_toolkit(finished_copy, "run", "tiny", "--until", "latency", "--json")
    assert result.returncode == 0, result.stderr
    assert "measured" in result.stderr.partition("probe at 20.28M: ")[2].partition("\n")[0]
    found = json.loads(result.stdout)
    assert found["budget"] == "20.28M"
    assert found["model"]["final"]["flops"] == found["model"]["baseline"]["flops"]
    assert found["commit"]["committed"]

    result = run_toolkit(finished_copy, "profile-table", "tiny", "--json")
    assert result.returncode == 0, result.stderr
    table = json.loads(result.stdout)
    assert len(table["networks"]) >= 3
    for one in table["networks"]:
        assert one["predicted_ms"] == pytest.approx(one["measured_ms"] * (1 + one["error"]))
    assert 0 <= table["median_error"] <= table["max_error"]
