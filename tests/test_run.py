"""The whole job as a user runs it, again and again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.conftest import PROFILE, Toolkit, image_folder, run_toolkit, write_job
from tests.test_adopt import network
from toolkit.report import document

Finished = tuple[Path, dict[str, Any]]
SCHEMA = json.loads(document.SCHEMA.read_text())
STAGES = [
    "data", "check", "train", "prune", "finetune", "export", "quantize", "reference", "build", "push", "bench",
    "compare", "report",
]  # fmt: skip


def again(folder: Path, *arguments: str, verb: str = "run") -> tuple[dict[str, Any], str]:
    result = run_toolkit(folder, verb, "tiny", "--precision", "int8", "--json", *arguments)
    return json.loads(result.stdout), result.stderr


def states(document: dict[str, Any]) -> dict[str, bool]:
    return {stage["name"]: stage["cached"] for stage in document["stages"]}


def digests(document: dict[str, Any]) -> dict[str, str]:
    """Digests of everything that is computed; a measurement never comes out the same."""
    return {s["name"]: s["artifact"] for s in document["stages"] if s["name"] not in ("bench", "report")}


def test_the_document_fits_its_schema(finished: Finished) -> None:
    _, run = finished
    jsonschema.validate(run, SCHEMA)
    assert [stage["name"] for stage in run["stages"]] == STAGES
    assert [name for name, skipped in states(run).items() if skipped] == ["compare"], (
        "there is nothing to compare with"
    )
    assert run["engine"]["precision"] == "int8"
    assert run["engine"]["provider"] == "CPUExecutionProvider"
    assert run["verdict"]["passed"]
    assert run["commit"]["committed"]
    assert run["fast"] is False
    assert run["model"]["baseline"]["flops"] == 2 * run["model"]["baseline"]["macs"] == 20_276_608


def test_the_schema_refuses_what_is_not_a_run(finished: Finished) -> None:
    for change in ({"fast": "no"}, {"engine": {}}, {"surprise": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(finished[1] | change, SCHEMA)


def test_the_release_is_current_and_whole(finished: Finished) -> None:
    folder, run = finished
    current = (folder / "build" / "devices" / "tiny" / "current").resolve()
    assert current.name == run["commit"]["release"] == run["commit"]["current"]
    manifest = json.loads((current / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        "agent.pyz", "engine.json", "model.optimized.onnx", "evaluation/images.npy", "evaluation/labels.npy",
    }  # fmt: skip
    assert all((current / name).is_file() for name in manifest["files"])


def test_an_unchanged_run_reuses_everything_and_imports_nothing_heavy(finished_copy: Path) -> None:
    code = (
        "import sys\nfrom toolkit.cli import cli\n"
        "try:\n    cli(['run', 'tiny', '--precision', 'int8', '--json'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "print(sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=finished_copy, capture_output=True, text=True, check=True
    )
    run = json.loads(result.stdout)
    jsonschema.validate(run, SCHEMA)
    assert all(states(run).values())
    loaded = result.stderr.splitlines()[-1]
    for heavy in ("torch", "modelopt", "onnx", "onnxruntime", "vl_convert", "sklearn"):
        assert f"'{heavy}'" not in loaded
    assert "reused from" in result.stderr


def test_rerun_makes_one_stage_anew_and_what_comes_out_the_same_changes_nothing_after_it(
    finished_copy: Path,
) -> None:
    run, _ = again(finished_copy, "--rerun", "export")
    assert [name for name, cached in states(run).items() if not cached] == ["export"]
    run, _ = again(finished_copy, "--rerun", "bench")
    assert [name for name, cached in states(run).items() if not cached] == ["bench", "report"]


def test_damage_is_named_and_mended(finished_copy: Path, finished: Finished) -> None:
    key = finished[1]["artifacts"]["export"]
    path = finished_copy / "build" / "store" / "export" / key / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    run, told = again(finished_copy)
    assert f"{key}/model.onnx has" in told
    assert digests(run) == digests(finished[1])
    assert [name for name, cached in states(run).items() if not cached] == ["export"]


def test_another_budget_shares_the_training_and_the_search(finished_copy: Path) -> None:
    result = run_toolkit(finished_copy, "prune", "tiny", "--flops", "70%", "--json", "-v")
    run = json.loads(result.stdout)
    assert states(run) == {"data": True, "check": True, "train": True, "prune": False}
    assert "candidate" not in result.stderr
    assert run["model"]["pruned"]["flops"] <= 0.7 * 81_102_208


def test_a_broken_contract_exits_1_and_leaves_what_was_current(finished_copy: Path, finished: Finished) -> None:
    write_job(finished_copy, PROFILE.replace("latency_p99: 1 s", "latency_p99: 1 us"))
    result = run_toolkit(finished_copy, "run", "tiny", "--precision", "int8", "--json")
    assert result.returncode == 1
    run = json.loads(result.stdout)
    assert not run["verdict"]["passed"]
    assert [line["what"] for line in run["verdict"]["lines"] if not line["passed"]] == ["latency p99"]
    assert "above the limit of 0.001 ms" in run["verdict"]["lines"][0]["reason"]
    assert not run["commit"]["committed"]
    assert states(run)["bench"], "a contract is judged again without measuring again"
    current = (finished_copy / "build" / "devices" / "tiny" / "current").resolve().name
    assert current == finished[1]["commit"]["release"] == run["commit"]["current"]
    assert run["commit"]["release"] != current


def test_the_current_release_that_breaks_its_contract_gives_way_to_the_previous(finished_copy: Path) -> None:
    for precision in ("fp32", "int8"):  # int8 stays previous once fp32 is current
        result = run_toolkit(finished_copy, "run", "tiny", "--precision", precision, "--json")
        assert result.returncode == 0, result.stderr
    before = json.loads(result.stdout)["commit"]
    root = finished_copy / "build" / "devices" / "tiny"
    contract = json.loads((root / "current" / "manifest.json").read_text())["contract"]
    assert contract["latency_p99"] == 1000
    bench = next((finished_copy / "build" / "store" / "bench").glob("*"))
    shutil.rmtree(bench.parent)
    slow = root / "releases" / before["current"] / "manifest.json"
    assert slow.is_file()
    code = (
        "import json, sys\nfrom dataclasses import replace\nfrom toolkit.bench import contract\n"
        "judge = contract.judge\n"
        "contract.judge = lambda *a: replace(judge(*a), status='failed')\n"
        "from toolkit.cli import cli\ncli(['run', 'tiny', '--precision', 'int8', '--json'])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=finished_copy, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    after = json.loads(result.stdout)["commit"]
    assert "back to release" in after["reason"]
    assert after["current"] == before["previous"]
    assert (root / "current").resolve().name == before["previous"]


def test_a_fast_run_is_marked_everywhere_and_not_committed(finished_copy: Path) -> None:
    for kept in ("devices", "runs"):
        shutil.rmtree(finished_copy / "build" / kept)
    profile = PROFILE + "fast: {epochs: 1, finetune_epochs: 1, train_images: 200, val_images: 50}\n"
    write_job(finished_copy, profile)
    result = run_toolkit(finished_copy, "run", "tiny", "--fast", "--flops", "120%")
    assert result.returncode == 0, result.stderr
    assert "fast run" in result.stderr
    assert "FAST RUN" in result.stdout
    assert "not committed: a fast run is not committed without --allow-fast" in result.stdout
    root = finished_copy / "build" / "devices" / "tiny"
    assert not (root / "current").exists()
    (release,) = (root / "releases").iterdir()
    assert json.loads((release / "manifest.json").read_text())["fast"] is True
    (page,) = (finished_copy / "build" / "runs").glob("*/report.html")
    assert "Fast run" in page.read_text()
    assert "Fast run" in page.with_suffix(".md").read_text()
    result = run_toolkit(finished_copy, "run", "tiny", "--fast", "--flops", "120%", "--allow-fast", "--json")
    run = json.loads(result.stdout)
    assert run["fast"] is True
    assert run["commit"]["committed"]
    assert (root / "current").exists()


def test_plan_changes_nothing_and_agrees_with_the_run(finished_copy: Path, job: Path, toolkit: Toolkit) -> None:
    def files(folder: Path) -> set[tuple[str, int]]:
        return {(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")}

    before = files(finished_copy)
    result = run_toolkit(finished_copy, "plan", "tiny", "--precision", "int8", "--json")
    plan = json.loads(result.stdout)
    assert {stage["name"]: stage["cached"] for stage in plan["stages"]} == dict.fromkeys(STAGES, True)
    result = run_toolkit(finished_copy, "plan", "tiny", "--precision", "int8", "--flops", "75%", "--json")
    plan = json.loads(result.stdout)
    pending = [stage["name"] for stage in plan["stages"] if not stage["cached"]]
    assert pending == [stage for stage in STAGES[3:] if stage != "compare"]
    assert plan["seconds"] > 0
    assert files(finished_copy) == before
    empty = toolkit("plan", "tiny")
    assert empty.returncode == 0
    assert "no earlier run to go by" in empty.stdout
    assert empty.stdout.splitlines()[-1] == "11 stages to run"
    assert not (job / "build").exists()
    other = run_toolkit(finished_copy, "plan", "tiny", "--data", "cifar10")
    assert "train     would run (no earlier run to go by)" in other.stdout, "nobody knows how many images there are"
    assert "would run (about" in other.stdout.partition("bench ")[2].partition("\n")[0]


def test_a_teacher_without_a_checkpoint_is_trained_first(finished_copy: Path, finished: Finished) -> None:
    """The finished job's own network teaches, trained in the same way, and so comes to the same weights."""
    taught = ["--teacher", "resnet20"]
    plan, _ = again(finished_copy, *taught, verb="plan")
    planned = [stage["name"] for stage in plan["stages"] if not stage["cached"]]
    assert planned == ["check", "teacher", *(stage for stage in STAGES[2:] if stage != "compare")]
    run, told = again(finished_copy, *taught, verb="finetune")
    assert run["error"] is None, told
    alone, store = finished[1], finished_copy / "build" / "store"
    teacher, untaught, learned = (
        (store / stage / document["artifacts"][stage] / "model.safetensors").read_bytes()
        for stage, document in (("teacher", run), ("train", alone), ("train", run))
    )
    assert teacher == untaught != learned
    assert run["model"]["final"] != alone["model"]["final"]
    plan, _ = again(finished_copy, *taught, verb="plan")
    assert states(plan)["finetune"]
    assert not states(plan)["quantize"]


def test_a_target_whose_gpu_is_not_here_goes_as_far_as_it_can(finished_copy: Path) -> None:
    """The profile is the finished job's, so that only the target's own part is left to do, and most of it once."""
    for target in ("a100", "t4", "jetson-orin", "jetson-orin-nano", "jetson-thor"):
        result = run_toolkit(finished_copy, "run", target, "--profile", "tiny", "--precision", "fp16", "--json")
        assert result.returncode == 1, target
        run = json.loads(result.stdout)
        jsonschema.validate(run, SCHEMA)
        assert [stage["name"] for stage in run["stages"]] == STAGES[:8]
        assert "no NVIDIA GPU" in run["error"]["message"]
        assert "not done: build, push, bench, report; the rest is kept" in result.stderr
        quantized = finished_copy / "build" / "store" / "quantize" / run["artifacts"]["quantize"]
        assert json.loads((quantized / "artifact.json").read_text())["meta"]["spelling"] == "tensorrt"


def test_garbage_collection(finished_copy: Path) -> None:
    result = run_toolkit(finished_copy, "gc")
    assert "nothing to remove" in result.stdout
    result = run_toolkit(finished_copy, "finetune", "tiny", "--flops", "120%", "--json")
    assert result.returncode == 0, result.stderr
    assert "nothing is pruned" in result.stderr
    model = json.loads(result.stdout)["model"]
    assert model["final"] == model["baseline"], "a budget above the baseline prunes nothing and goes on"
    result = run_toolkit(finished_copy, "gc", "--keep", "1")
    assert "/prune/" in result.stdout
    assert "/train/" not in result.stdout
    assert "can be removed" in result.stdout
    result = run_toolkit(finished_copy, "gc", "--keep", "1", "--remove")
    assert "removed" in result.stdout
    run, _ = again(finished_copy, "--flops", "120%", verb="prune")
    assert all(states(run).values())
    plan, _ = again(finished_copy, verb="plan")
    assert not states(plan)["export"]


def test_two_runs_at_once_share_the_work(finished_copy: Path, finished: Finished) -> None:
    shutil.rmtree(finished_copy / "build" / "store" / "train")
    command = [sys.executable, "-m", "toolkit", "train", "tiny", "--json"]
    runs = [
        subprocess.Popen(command, cwd=finished_copy, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    documents = [json.loads(out) for out, _ in printed]
    assert documents[0]["artifacts"] == documents[1]["artifacts"]
    assert sorted(states(document)["train"] for document in documents) == [False, True]
    assert digests(documents[0]).items() <= digests(finished[1]).items()


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("stage", "begun"),
    [
        ("data", ".partial/data-*"),
        ("train", ".resume/train-*/checkpoint.pt"),
        ("prune", ".resume/prune-*/search.pth"),
        ("bench", ".partial/bench-*"),
    ],
)
def test_ctrl_c_ends_with_130_and_loses_nothing(
    finished_copy: Path, finished: Finished, stage: str, begun: str
) -> None:
    store = finished_copy / "build" / "store"
    shutil.rmtree(store / stage)
    command = [sys.executable, "-m", "toolkit", "run", "tiny", "--precision", "int8"]
    process = subprocess.Popen(
        command, cwd=finished_copy, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: list(store.glob(begun)), process)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 130, told
    assert "the same command continues where it stopped" in told
    assert "Traceback" not in told
    run, _ = again(finished_copy)
    assert digests(run) == digests(finished[1])


def test_kill_9_in_one_stage_after_another_ends_in_the_same_artifacts(
    finished_copy: Path, finished: Finished
) -> None:
    """A run is killed as soon as it has something to lose; the next one goes on with what is left."""
    build = finished_copy / "build"
    store = build / "store"
    shutil.rmtree(build / "devices")
    for name in [".search", *STAGES[STAGES.index("train") :]]:
        shutil.rmtree(store / name, ignore_errors=True)
    command = [sys.executable, "-m", "toolkit", "run", "tiny", "--precision", "int8"]
    for kept in (
        ".resume/train-*/checkpoint.pt", ".resume/prune-*/search.pth", ".partial/export-*/*", ".partial/bench-*",
    ):  # fmt: skip
        with subprocess.Popen(
            command, cwd=finished_copy, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            wait_for(lambda kept=kept: list(store.glob(kept)), process)
            os.killpg(process.pid, signal.SIGKILL)
    run, _ = again(finished_copy)
    assert digests(run) == digests(finished[1])
    assert not list((store / ".partial").iterdir())
    current = (build / "devices" / "tiny" / "current").resolve()
    assert current.name == finished[1]["commit"]["release"]


def test_an_image_folder_and_a_model_of_the_users(tmp_path: Path) -> None:
    """What `toolkit init` writes runs as it stands."""
    assert run_toolkit(tmp_path, "init").returncode == 0
    arguments = ("my-device", "--model", "my_model:build", "--data", "imagefolder:images")
    result = run_toolkit(tmp_path, "run", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    run = json.loads(result.stdout)
    jsonschema.validate(run, SCHEMA)
    assert run["bench"]["accuracy"] > 0.8
    assert run["model"]["final"]["flops"] < 0.7 * run["model"]["baseline"]["flops"]
    result = run_toolkit(tmp_path, "init")
    assert result.returncode == 2
    assert "is there already" in result.stderr
    (tmp_path / "my_model.py").write_text((tmp_path / "my_model.py").read_text().replace("16, 1", "24, 1"))
    plan = json.loads(run_toolkit(tmp_path, "plan", *arguments, "--json").stdout)
    assert {s["name"]: s["cached"] for s in plan["stages"]}["train"] is False, "the model's code is part of the key"


def test_weights_start_from_a_checkpoint(finished_copy: Path, finished: Finished) -> None:
    weights = finished_copy / "build" / "store" / "train" / finished[1]["artifacts"]["train"] / "model.safetensors"
    write_job(finished_copy, PROFILE.replace("epochs: 3, fine", "epochs: 0, fine"))
    result = run_toolkit(finished_copy, "train", "tiny", "--weights", str(weights), "--json")
    assert result.returncode == 0, result.stderr
    trained = json.loads(result.stdout)["model"]["baseline"]
    assert trained["accuracy"] == pytest.approx(finished[1]["model"]["baseline"]["accuracy"])


def test_corrupt_images_stop_the_run_or_are_counted(job: Path, toolkit: Toolkit) -> None:
    counts = {"train": dict.fromkeys("abcd", 12), "test": dict.fromkeys("abcd", 4)}
    root = image_folder(job / "images", counts)
    (root / "train" / "a" / "0.png").write_bytes(b"not a png")
    network(job / "net.onnx")
    arguments = ("export", "tiny", "--model", "onnx:net.onnx", "--mean", "0.5", "--std", "0.25")
    arguments += ("--data", "imagefolder:images")
    result = toolkit(*arguments)
    assert result.returncode == 2
    assert "a/0.png is corrupt" in result.stderr
    assert not list((job / "build" / "store").glob("data/*"))
    result = toolkit(*arguments, "--skip-bad-images")
    assert result.returncode == 0, result.stderr
    assert "1 bad files left out" in result.stderr
