"""Sweeps: which candidate is chosen, the whole of it on a small job, and the page on a phone."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from tests.conftest import job_of, run_toolkit
from tests.pages import Measured, figure
from tests.test_adopt import model, network
from tests.test_report import browser, browser_only, drawn, opened  # noqa: F401
from toolkit import files, garbage, pipeline, sweep, workers
from toolkit.agent import facts
from toolkit.candidates import Axes, Candidate, choose, halve, lay_out, runtimes_for
from toolkit.config import Flops
from toolkit.console import Console
from toolkit.errors import StageError, ToolkitError, UsageError
from toolkit.job import Job
from toolkit.report import comparison, recorded, terminal, vega
from toolkit.runs import Outcome
from toolkit.stages import Runner
from toolkit.store import Artifact, Store

SCHEMA = json.loads(sweep.SCHEMA.read_text())


def one(label: str, ms: float | None, accuracy: float | None, verdict: str = "passed") -> dict[str, Any]:
    return {"label": label, "verdict": verdict, "p50": figure(ms, 0.02), "accuracy": accuracy}


@pytest.mark.parametrize(
    ("measured", "chosen", "says"),
    [
        ([one("a", 1.0, 0.9), one("b", 0.5, 0.8)], "b", "the fastest of 2 that keep the contract"),
        ([one("a", 1.0, 0.9), one("b", 0.5, 0.8)], "b", "a is 10.00 points more accurate and 100% slower"),
        # of two that are as accurate, the faster one, and rather than an image more at twice the time
        ([one("a", 2.0, 0.9), one("b", 0.5, 0.8), one("c", 1.0, 0.9)], "b", "c is 10.00 points more accurate"),
        ([one("a", 2.0, 0.9), one("b", 0.5, 0.8), one("c", 1.0, 0.898)], "b", "c is 9.80 points more accurate"),
        ([one("a", 2.0, 0.9), one("b", 0.5, 0.8), one("c", 0.6, 0.801)], "b", "a is 10.00 points more accurate"),
        ([one("a", 1.0, 0.9), one("b", 0.5, 0.8, "failed")], "a", "the only candidate that keeps the contract"),
        ([one("a", 1.0, 0.9), one("b", 0.985, 0.8)], "a", "not significantly slower"),
        ([one("a", 1.0, 0.9), one("b", 0.98, 0.9)], "b", "the fastest of 2"),
        # b is no better than a, nor c than b: whoever took c would give up accuracy for nothing, step by step
        ([one("a", 1.0, 0.9), one("b", 0.985, 0.8), one("c", 0.97, 0.7)], "a", "every faster one, c first"),
        # a was measured badly, which puts it beside nobody else
        ([one("a", 1.0, 0.9) | {"p50": figure(1.0, 0.9)}, one("b", 0.5, 0.8)], "b", "the fastest of 2"),
        ([one("a", 1.0, None), one("b", 0.5, None)], "b", "the fastest of 2"),
        ([one("a", None, 0.9)], None, "no candidate keeps the contract"),
        ([one("a", 1.0, 0.9, "undecided")], None, "no candidate keeps the contract"),
        ([], None, "no candidate keeps the contract"),
    ],
)
def test_the_choice(measured: list[dict[str, Any]], chosen: str | None, says: str) -> None:
    label, why = choose(measured)
    assert label == chosen
    assert says in why


def test_what_cannot_be_is_left_out_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "runtimes", lambda: {"onnxruntime": "1.23"})
    network(tmp_path / "net.onnx")
    job = job_of(tmp_path, "none", model=model(tmp_path / "net.onnx"))
    stages = Runner(Store(tmp_path / "store"), Console(quiet=True), "check")
    axes = Axes([job.budget], ["fp32", "int8"], ["fastnas"], runtimes_for(job.target))
    found, left_out = lay_out(job, axes, stages)
    assert [one.label for one in found] == ["fp32 onnxruntime"]
    assert [one.label for one in left_out] == ["int8 onnxruntime", "fp32 openvino", "int8 openvino"]
    assert "only noise" in str(left_out[0])
    assert "OpenVINO is not installed on this machine; hint: python3 -m pip install openvino" in str(left_out[1])
    (open_still,), _ = lay_out(job, replace(axes, runtimes=[]), stages)
    assert (open_still.label, open_still.job.target.alternatives) == ("fp32", ["openvino"])
    with pytest.raises(UsageError, match="t4 has a GPU"):
        runtimes_for(files.load_target("t4"))


def test_what_keeps_every_candidate_from_being_is_looked_at_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def destination(job: Job) -> Any:
        asked.append(job)
        raise StageError("no such host")

    monkeypatch.setattr(pipeline, "destination", destination)
    job = digits(tmp_path)
    axes = Axes([Flops.parse("60%"), Flops.parse("40%")], ["fp32", "int8"], ["fastnas"], ["onnxruntime"])
    with pytest.raises(StageError, match="no such host"):
        lay_out(job, axes, Runner(Store(tmp_path / "store"), Console(quiet=True), "check"))
    assert len(asked) == 1


def test_what_networks_share_is_made_first_and_by_the_smallest(tmp_path: Path) -> None:
    made = []

    def make(jobs: Mapping[str, Job], until: str) -> Iterator[tuple[str, ToolkitError | None]]:
        for name, job in jobs.items():
            made.append((str(job.budget), job.profile.pruner, until))
            yield name, StageError("no room") if job.profile.pruner == "fastnas" else None

    found = [
        Candidate("", digits(tmp_path, pruner, budget), share)
        for pruner in ("fastnas", "depgraph")
        for budget, share in (("100%", 1.0), ("60M", 0.6), ("40%", 0.4))
    ]
    sweep._share(found, make)
    assert sorted(made) == [("40%", "depgraph", "prune"), ("40%", "fastnas", "prune")]
    with pytest.raises(StageError, match="no room"):
        sweep._share(found[:3], make)


def test_a_graph_is_made_once_and_none_of_a_network_that_failed(tmp_path: Path) -> None:
    made = []

    def make(jobs: Mapping[str, Job], until: str) -> Iterator[tuple[str, ToolkitError | None]]:
        for name in jobs:
            made.append((name, until))
            yield name, StageError("no room") if "60%" in name else None

    found = [
        Candidate("", replace(digits(tmp_path, budget=budget), target=target, precision=precision))
        for target in (files.load_target("host-cpu"), files.load_target("host-cpu").using("openvino"))
        for budget in ("60%", "40%")
        for precision in ("fp32", "int8")
    ]
    console = Console(quiet=True)
    kept = sweep._make(found, sweep._network, make, console, "export")
    assert {str(one.job.budget) for one in kept} == {"40%"}
    graph = functools.partial(sweep._graph, alike=sweep._network)
    assert len(sweep._make(kept, graph, make, console, "reference")) == 4
    assert made == [
        ("60% fastnas", "export"),
        ("40% fastnas", "export"),
        ("40% fastnas fp32 onnxruntime", "reference"),
        ("40% fastnas int8 onnxruntime", "reference"),
    ]


def test_networks_that_were_pruned_to_the_same_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found_of(job: Job, until: str) -> dict[tuple[str, str], Artifact]:
        digest = "a" if str(job.budget) in ("75%", "60%") else "b"
        return {(stage, ""): replace(Artifact.pending(stage), digest=digest) for stage in ("train", "prune")}

    monkeypatch.setattr(workers, "found_of", found_of)
    jobs = [digits(tmp_path, budget=budget) for budget in ("75%", "60%", "45%")]
    alike = sweep._alike([Candidate("", job) for job in jobs for _ in range(2)])
    assert [alike(job) for job in jobs] == ["75% fastnas", "75% fastnas", "45% fastnas"]


def test_the_first_of_a_precision_says_which_runtime_the_others_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def execute(job: Job, until: str, console: Console, rerun: frozenset[str]) -> Outcome:
        asked.append((job.target.runtime, job.target.alternatives))
        if len(asked) == 1:
            return Outcome({"engine": None, "bench": None}, StageError("no room"), 1)
        medians = {"onnxruntime": {"value": 2.0}, "openvino": {"value": 1.0 if job.precision == "int8" else 3.0}}
        runtime = job.target.runtime
        if job.target.alternatives:
            runtime = min(medians, key=lambda name: medians[name]["value"])
        return Outcome({"engine": {"runtime": runtime, "runtimes": medians}}, None, 0)

    monkeypatch.setattr(sweep.runs, "execute", execute)
    found = [
        Candidate(f"{budget} {precision}", replace(digits(tmp_path, budget=budget), precision=precision))
        for budget in ("75%", "60%", "45%")
        for precision in ("fp32", "int8")
    ]
    measured, notes = sweep._measure(found, Console(), frozenset())
    both = ("onnxruntime", ["openvino"])
    assert asked == [both, both, both, ("openvino", []), ("onnxruntime", []), ("openvino", [])]
    assert [one.label for one, _ in measured] == [
        "75% fp32", "75% int8 openvino", "60% fp32 onnxruntime", "60% int8 openvino", "45% fp32 onnxruntime",
        "45% int8 openvino",
    ]  # fmt: skip
    assert [one.job.target.runtime for one, _ in measured[1:3]] == ["openvino", "onnxruntime"]
    said = "int8 in OpenVINO (p50 1.000 ms), faster here than ONNX Runtime (p50 2.000 ms), with 75% int8"
    assert said in notes
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("jobs", "here"), [(1, ["0"]), (2, []), (3, ["2"]), (4, [])])
def test_a_network_that_would_be_made_alone_gets_all_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, here: list[str]
) -> None:
    made: dict[str, bool] = {}

    def compress(job: Job, until: str, console: Console) -> None:
        made[str(job.seed)] = threading.current_thread() is threading.main_thread()

    monkeypatch.setattr(workers, "found_of", lambda job, until: {})
    monkeypatch.setattr(workers, "compress", compress)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda parallel, *_: ThreadPoolExecutor(parallel))
    with workers.processes(2, Console(quiet=True)) as make:
        named = {str(seed): replace(digits(tmp_path), seed=seed) for seed in range(jobs)}
        assert dict(make(named, "export")) == dict.fromkeys(named)
    assert [name for name, alone in made.items() if alone] == here
    assert len(made) == jobs


def test_a_device_that_is_gone_at_the_end_costs_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def destination(job: Job) -> Any:
        raise StageError("orin does not answer")

    monkeypatch.setattr(pipeline, "destination", destination)
    assert sweep._current(digits(tmp_path), Console()) is None
    assert "which release is current is not known: orin does not answer" in capsys.readouterr().err


def digits(build: Path, pruner: str = "fastnas", budget: str = "60%") -> Job:
    profile = files.load_profile("host-cpu").model_copy(update={"pruner": pruner})
    return job_of(build, profile=profile, budget=Flops.parse(budget))


def test_of_each_budget_the_worse_half_is_dropped(tmp_path: Path) -> None:
    found = []
    for budget in ("60%", "40%"):
        for pruner in ("a", "b", "c"):
            for precision in ("fp32", "int8"):
                job = replace(digits(tmp_path, pruner, budget), precision=precision)
                found.append(Candidate(f"{budget} {precision} {pruner}", job))
    asked: list[str] = []

    def score(one: Candidate) -> float:
        asked.append(one.label)
        if one.label.startswith("40% fp32 c"):
            raise UsageError("it cannot follow the network", "another pruner")
        return {"a": 0.9, "b": 0.7, "c": 0.8}[one.job.profile.pruner]

    kept, left_out = halve(found, score)
    assert len(asked) == 6, "precisions share their network"
    assert {one.label for one in kept if one.job.budget == Flops.parse("60%")} == {
        "60% fp32 a", "60% int8 a", "60% fp32 c", "60% int8 c",
    }  # fmt: skip
    assert {one.label for one in kept if one.job.budget == Flops.parse("40%")} == {"40% fp32 a", "40% int8 a"}
    reasons = {one.label: one.reason for one in left_out}
    assert "70.00% of the validation images, with a 90.00%" in reasons["60% int8 b"]
    assert reasons["40% int8 c"] == "it cannot follow the network"


@pytest.mark.parametrize(("cores", "gpus", "networks"), [(1, 0, {1}), (64, 3, {3}), (2, 0, {1, 2})])
def test_so_many_networks_side_by_side(
    monkeypatch: pytest.MonkeyPatch, cores: int, gpus: int, networks: set[int]
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert workers.fitting() in networks


def test_memory_limits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 10_000)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 <= workers.fitting() <= max(1, total / 4e9)


def test_a_sweep_goes_on_where_it_was_interrupted_and_switches_nothing(
    finished: tuple[Path, dict[str, Any]], finished_copy: Path
) -> None:
    """First while two networks train at the same time, then between two candidates."""
    shutil.rmtree(finished_copy / "build" / "store" / "finetune")
    arguments = ["sweep", "tiny", "--flops", "80%,70%,10%", "--precision", "int8,fp32"]
    arguments += ["--parallel", "2", "--json"]
    command = [sys.executable, "-m", "toolkit", *arguments]
    begun = subprocess.Popen(
        command, cwd=finished_copy, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not list(finished_copy.glob("build/store/.resume/finetune-*")):
        assert begun.poll() is None, begun.communicate()[1]
        time.sleep(0.1)
    os.killpg(begun.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, told = begun.communicate(timeout=120)  # until the last process that could write has ended
    assert begun.returncode == 130, told
    assert "the same command continues" in told
    assert "Traceback" not in told

    begun = subprocess.Popen(command, cwd=finished_copy, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert begun.stderr
    said = []
    for line in begun.stderr:
        said.append(line)
        if line.startswith("candidate 2 of 4"):
            begun.send_signal(signal.SIGINT)
            break
    _, told = begun.communicate(timeout=300)
    assert begun.returncode == 130, told
    assert "the same command continues" in told
    assert any("% fastnas: finetune" in line for line in said), "each tells how far it is"

    result = run_toolkit(finished_copy, *arguments)
    assert result.returncode == 0, result.stderr
    assert "80% fastnas int8 onnxruntime: reference made" in result.stderr
    assert "done in" not in result.stderr.partition("candidate 2 of 4")[0], "what was there is made again"
    found = json.loads(result.stdout)
    jsonschema.validate(found, SCHEMA)
    assert [one["label"] for one in found["candidates"]] == ["80% int8", "80% fp32", "70% int8", "70% fp32"]
    assert [one["label"] for one in found["left_out"]] == ["10% int8", "10% fp32"]
    assert "cannot be reached" in found["left_out"][0]["reason"]
    assert found["recommended"] in [one["label"] for one in found["candidates"]]
    assert found["current"] == finished[1]["commit"]["release"], "the finished job's own"
    releases = json.loads(run_toolkit(finished_copy, "releases", "tiny", "--json").stdout)
    assert [release["id"] for release in releases["releases"] if release["current"]] == [found["current"]]
    page = (finished_copy / found["report"]).read_text()
    assert f"Recommended: {found['recommended']}" in page
    assert "10% fp32 is left out" in page
    told = terminal.sweep(found)
    assert f"→ {found['recommended']}" in told
    removed = [path.name for path, _ in garbage.collect(finished_copy / "build", 1, remove=False)]
    assert not {one["run"] for one in found["candidates"]} & set(removed), "a sweep keeps all that it refers to"


def test_halving_judges_the_epoch_whose_weights_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compress(job: Job, stages: Runner) -> None:
        history = [{"val": 0.8}, {"val": 0.7}]
        stages.artifacts["finetune"] = replace(Artifact.pending("finetune"), meta={"history": history})

    monkeypatch.setattr(sweep.networks, "compress", compress)
    assert sweep._score(Candidate("any", job_of(tmp_path)), Console(quiet=True)) == 0.8


def test_halving_goes_on_with_the_better_network_of_each_budget(finished_copy: Path) -> None:
    arguments = ["--flops", "100%,70%", "--pruner", "fastnas,depgraph", "--halving", "--parallel", "1", "--json"]
    result = run_toolkit(finished_copy, "sweep", "tiny", *arguments)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert {one["label"].split()[0] for one in found["candidates"]} == {"100%", "70%"}
    assert {one["label"].split()[0] for one in found["left_out"]} == {"100%", "70%"}
    assert all("after a short fine-tuning it is right on" in one["reason"] for one in found["left_out"])


def test_no_process_outlives_one_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(
        "import multiprocessing, os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from toolkit import workers\n"
        "def work():\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    with ProcessPoolExecutor(1, context, workers.start, (1, context.Value('i', 0))) as pool:\n"
        "        pool.submit(work).result()\n"
    )
    with subprocess.Popen([sys.executable, "busy.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        worker = Path("/proc", parent.stdout.readline().strip())
        assert worker.exists()
        parent.kill()
    for _ in range(100):
        if not worker.exists():
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")


def test_the_device_decides_the_precision(finished_copy: Path) -> None:
    result = run_toolkit(finished_copy, "run", "tiny", "--precision", "auto", "--json")
    found = json.loads(result.stdout)
    assert result.returncode == 0, result.stderr
    assert {one["label"] for one in found["candidates"]} == {"fp32", "fp16", "int8"}
    chosen = next(one for one in found["candidates"] if one["label"] == found["recommended"])
    assert found["commit"]["committed"]
    assert found["commit"]["current"] == chosen["release"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sweep", "tiny", "--precision", "fp32,int9"], "'int9' is not one of"),
        (["sweep", "tiny", "--flops", "60%,x"], "--flops: 'x' is not a number"),
        (["sweep", "tiny", "--hosts", "a,b"], "a fleet is meant"),
        (["sweep", "tiny", "--halving"], "--halving compares pruners at the same budget"),
        (["sweep", "tiny", "--ray", "head:6379"], "--ray head:6379 is no address of a Ray cluster"),
        (["run", "tiny", "--flops", "60%,70%"], "--flops 60%,70% is a list"),
        (["run", "tiny", "--precision", "fp32,auto"], "--precision fp32,auto is a list"),
        (["sweep", "tiny", "--rerun", "train"], "candidates share the stage 'train'"),
        (["sweep", "tiny", "--runtime", "tensorrt"], "needs its GPU's compute_capability"),
        (["run", "tiny", "--precision", "auto", "--waves", "1,100%"], "--waves does not go with 'auto'"),
        (["run", "tiny", "--precision", "auto", "--until", "latency"], "--until does not go with 'auto'"),
        (["run", "tiny", "--flops", "60%", "--until", "latency"], "--until latency finds the budget itself"),
        (["train", "tiny", "--precision", "auto"], "'auto' is decided by measuring"),
        (["sweep", "tiny", "--gpus", "2", "--parallel", "2"], "--gpus has several GPUs train one network"),
        (["run", "tiny", "--until", "latency", "--waves", "1,100%"], "--until latency measures on one device"),
        (["profile-table", "tiny", "--rerun", "bench"], "leave out --rerun"),
        (["sweep", "tiny", "--data", "imagefolder:x", "--flops", "60%,50%"], "the data folder x does not exist"),
    ],
)
def test_what_cannot_be_is_said_at_once(job: Path, arguments: list[str], says: str) -> None:
    result = run_toolkit(job, *arguments)
    assert result.returncode == 2, result.stderr
    assert says in result.stderr
    assert not (job / "build" / "store" / "train").exists()


def test_processes_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = multiprocessing.Value("i", 0)
    for _ in range(3):
        workers.start(1, started)
    assert taken == [0, 1, 0]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight candidates, and the release that is current."""
    measured = Measured(tmp_path_factory.mktemp("sweep"))
    store = Store(measured.build / "store")
    entries = []
    for number, (budget, precision) in enumerate((b, p) for b in (75, 60, 45, 35) for p in ("fp32", "int8")):
        ms, accuracy = 0.1 + budget / 200 * (0.6 if precision == "int8" else 1), 0.97 + budget / 4000
        name = f"20261121T120000-tiny-{number}"
        document = measured.run(name, samples=2000, median_ms=ms, accuracy=accuracy)
        bench = recorded.artifact(store, document, "bench")
        label = f"{budget}% {precision}"
        entries.append(comparison.Entry(label, document, bench, recommended=number == 3, current=number == 0))
    out = measured.build / "report.html"
    library = vega.library(store.root / ".vega")
    out.write_text(comparison.html("a sweep", entries, [], library, "Recommended: 60% int8, the fastest"))
    return out


@browser_only
def test_eight_candidates_can_be_read_on_a_phone(browser: Any, page: Path) -> None:  # noqa: F811
    with opened(browser, page, width=390) as tab:
        figure = drawn(tab, "pareto")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        texts = figure.locator(".live .role-mark text")
        assert sorted(texts.all_text_contents()) == [str(number) for number in range(1, 9)]
        boxes = [text.bounding_box() for text in texts.all()]
        for index, a in enumerate(boxes):
            for b in boxes[:index]:
                apart = abs(a["x"] - b["x"]) >= min(a["width"], b["width"]) or abs(a["y"] - b["y"]) >= 8
                assert apart, "no number stands on another one"
        rows = tab.locator("tbody tr").all_inner_texts()
        assert "recommended" in rows[3]
        assert rows[0].startswith("1. 75% fp32")
        assert "current" in rows[0]
