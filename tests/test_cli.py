from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import PROFILE, TARGET, Toolkit, run_toolkit, write_job

HEAVY = ("torch", "modelopt", "onnx", "onnxruntime", "paramiko", "numpy", "pydantic", "vl_convert", "sklearn")
ROOT = Path(__file__).parent.parent
ONNX = [
    "run",
    "tiny",
    "--model",
    "onnx:profiles/tiny.yaml",
]  # any file that exists: what is refused comes before it


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["targets", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom toolkit.cli import cli\n"
        f"try:\n    cli({arguments!r})\nexcept SystemExit as e: assert not e.code\n"
        "print(*{m.split('.')[0] for m in sys.modules}, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(result.stderr.split()) & set(HEAVY)


def test_every_verb_is_listed(toolkit: Toolkit) -> None:
    from toolkit.cli import _VERBS

    text = toolkit("--help").stdout
    for verb in (
        "run",
        "plan",
        "train",
        "prune",
        "finetune",
        "export",
        "quantize",
        "build",
        "push",
        "bench",
        "report",
    ):
        assert f"\n  {verb} " in text
    for verb in _VERBS:
        assert f"\n  {verb} " in text


def test_every_stage_can_be_made_anew() -> None:
    from toolkit import pipeline
    from toolkit.commands.options import RERUN

    assert set(RERUN) == set(pipeline.STAGES) - {"push"} | {"all"}


def test_targets_and_profiles(toolkit: Toolkit, job: Path) -> None:
    assert "jetson-orin-nano" in toolkit("targets").stdout
    assert "tiny" in toolkit("targets", "list").stdout
    assert "runtime: tensorrt" in toolkit("targets", "show", "t4").stdout
    assert "latency_p99: 1000 ms" in toolkit("profiles", "show", "tiny").stdout
    assert toolkit("profiles", "validate", "profiles/tiny.yaml").stdout.endswith("is a valid profile\n")
    assert toolkit("targets", "validate", "profiles/tiny.yaml").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "tinny"], ["no target is called 'tinny'", "did you mean 'tiny'?"]),
        (["run", "tiny", "--profile", "tyni"], ["no profile is called 'tyni'", "did you mean 'tiny'?"]),
        (["run", "tiny", "--model", "resnet21"], ["no model is called 'resnet21'", "did you mean 'resnet20'?"]),
        (["run", "tiny", "--data", "digit"], ["no data set is called 'digit'", "did you mean 'digits'?"]),
        (["run", "tiny", "--data", "imagefolder:nowhere"], ["data folder nowhere does not exist", "train/<class>"]),
        (["run", "tiny", "--flops", "lots"], ["--flops: 'lots' is not a number", "75%"]),
        (["run", "tiny", "--model", "nomodule:f"], ["the module 'nomodule' cannot be found"]),
        (["run", "tiny", "--model", "torchvision:resnet17"], ["no classification model 'resnet17'", "resnet18"]),
        (["run", "tiny", "--weights", "nowhere.pt"], ["the checkpoint 'nowhere.pt' is not a file"]),
        (["run", "tiny", "--precision", "fp4"], ["'fp4' is not one of 'fp32', 'fp16', 'int8', 'fp8', 'auto'"]),
        (["run", "tiny", "--rerun", "trian"], ["'trian' is not one of", "train"]),
        (["run", "tiny", "--model", "onnx:nowhere.onnx"], ["the ONNX file 'nowhere.onnx' does not exist"]),
        (["run", "tiny", "--model", "onnx:profiles/tiny.yaml", "--data", "none"], ["is not an ONNX file"]),
        (["run", "tiny", "--input-range", "-1,1"], ["are for an ONNX file", "leave them out"]),
        (["run", "tiny", "--data", "none"], ["is trained, and --data none has no labels", "--model onnx:FILE"]),
        (["run", "tiny", "--data", "inputs:x.npy"], ["inputs:x.npy has no labels", "give a labelled data set"]),
        ([*ONNX, "--weights", "profiles/tiny.yaml"], ["brings its own weights"]),
        ([*ONNX, "--flops", "50%"], ["is not pruned to a budget"]),
        ([*ONNX, "--fast"], ["--fast shortens nothing"]),
        ([*ONNX, "--data", "none", "--precision", "int8"], ["has only noise", "--data inputs:FILE.npy"]),
        (["run"], ["Missing argument 'TARGET'"]),
        (["rum", "tiny"], ["no command is called 'rum'; did you mean 'run'?"]),
        (["profiles", "show", "a10"], ["no profile is called 'a10'", "a100"]),
        (["profiles", "validate", "nowhere.yaml"], ["cannot read nowhere.yaml"]),
    ],
)
def test_bad_input_ends_in_a_sentence_and_2(
    job: Path, toolkit: Toolkit, arguments: list[str], words: list[str]
) -> None:
    result = toolkit(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    store = job / "build" / "store"
    assert not list(store.glob("train/*"))
    assert not store.exists() or not list(store.glob(".partial/*/*"))


def test_a_wrong_profile_is_named_with_its_line(job: Path, toolkit: Toolkit) -> None:
    write_job(job, PROFILE + "precison: int8\n", TARGET)
    result = toolkit("plan", "tiny")
    assert result.returncode == 2
    assert "profiles/tiny.yaml:8: unknown key 'precison'; did you mean 'precision'?" in result.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import nothing_of_the_kind\ndef build(num_classes): ...\n", "does not import: ModuleNotFoundError"),
        ("def build(num_classes): return 'x'\n", "returned str, not a torch.nn.Module"),
        ("def build(num_classes):\n", "is not valid Python"),
        (
            "from torch import nn\ndef build(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(7, 2))\n",
            "does not accept images of 3×16×16",
        ),
        (
            "from torch import nn\ndef build(num_classes):\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))\n",
            "leave recipe.small_crops out of the profile",
        ),
        (
            "from torch import nn\nclass N(nn.Module):\n"
            "    def __init__(self, n):\n        super().__init__(); self.f = nn.Linear(3, n)\n"
            "    def forward(self, x):\n        x = x.mean((2, 3))\n"
            "        return self.f(x) if x.sum() > 0 else -self.f(x)\n"
            "def build(num_classes): return N(num_classes)\n",
            "FastNAS cannot trace the model 'mine:build'",
        ),
    ],
)
def test_a_model_that_cannot_be_used_is_told_before_training(
    job: Path, toolkit: Toolkit, code: str, words: str
) -> None:
    write_job(job, PROFILE.replace("epochs: 3", "epochs: 3, small_crops: 0.5"), TARGET)
    (job / "mine.py").write_text(code)
    result = toolkit("run", "tiny", "--model", "mine:build")
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (job / "build" / "store" / "train").exists()


def test_a_store_of_a_newer_version_is_refused(job: Path, toolkit: Toolkit) -> None:
    (job / "build" / "store").mkdir(parents=True)
    (job / "build" / "store" / "store.json").write_text('{"format": 2}')
    result = toolkit("run", "tiny")
    assert result.returncode == 2
    assert "is a store of format 2; this version reads format 1" in result.stderr


def test_errors_are_in_the_document_too(finished_copy: Path) -> None:
    result = run_toolkit(finished_copy, "run", "tiny", "--flops", "10%", "--json")
    assert result.returncode == 2
    assert "the smallest network has 12.17 MFLOPs" in result.stderr
    assert "--flops 61%" in result.stderr
    run = json.loads(result.stdout)
    assert "cannot be reached" in run["error"]["message"]
    assert run["verdict"] is None
    assert [stage["name"] for stage in run["stages"]] == ["data", "check"]


def test_another_host_is_refused_plainly(finished_copy: Path) -> None:
    result = run_toolkit(finished_copy, "run", "tiny", "--host", "orin")
    assert result.returncode == 1
    assert "error: the host 'orin' (root@orin:22) is not known" in result.stderr


def test_ctrl_c_ends_with_130_even_in_code_that_a_library_compiles(job: Path) -> None:
    interrupted = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    (job / "yaml.py").write_text(f"exec({interrupted!r})\n")
    command = [sys.executable, "-m", "toolkit", "targets"]
    result = subprocess.run(command, cwd=job, capture_output=True, text=True)
    assert result.returncode == 130, result.stderr
    assert "the same command continues where it stopped" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(toolkit: Toolkit, job: Path, shell: str) -> None:
    script = toolkit(env={"_TOOLKIT_COMPLETE": f"{shell}_source"}).stdout
    assert "_TOOLKIT_COMPLETE" in script
    words = {"COMP_WORDS": "toolkit run t", "COMP_CWORD": "t" if shell == "fish" else "2"}
    completed = toolkit(env={"_TOOLKIT_COMPLETE": f"{shell}_complete"} | words).stdout
    assert "tiny" in completed
    assert "t4" in completed


def test_no_color(job: Path, toolkit: Toolkit) -> None:
    assert "\x1b[" not in toolkit("run", "nothing", env={"NO_COLOR": "1"}).stderr


def test_the_wheel_brings_profiles_and_targets(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    empty = tmp_path / "empty"
    empty.mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import toolkit, toolkit.devices.agent, toolkit.report.document as d\n"
        f"assert toolkit.__file__.startswith({str(tmp_path)!r}), toolkit.__file__\n"
        "assert d.SCHEMA.is_file() and toolkit.devices.agent.pack()\n"
        "from toolkit.cli import cli\ncli(['plan', 'host-cpu'])"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=empty, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "would run" in result.stdout
    names = zipfile.ZipFile(wheel).namelist()
    for kind in ("profiles", "targets"):
        for path in (ROOT / kind).iterdir():
            assert f"toolkit/shipped/{kind}/{path.name}" in names


def test_each_pruner_knows_what_it_skips_and_how_far_it_goes(job: Path, toolkit: Toolkit) -> None:
    result = toolkit("run", "tiny", "--pruner", "depgraph", "--flops", "10%")
    assert result.returncode == 2
    assert "by depgraph, which skips conv1, fc, layer1.0.conv1 and 5 more layers (3" in result.stderr
    assert "the FLOPs budget of 10% cannot be reached" in result.stderr
    (job / "teacher.pt").write_bytes(b"nothing")
    result = toolkit("run", "tiny", "--teacher", "resnet20=teacher.pt")
    assert result.returncode == 2
    assert "the checkpoint teacher.pt cannot be read" in result.stderr
    assert not (job / "build" / "store" / "train").exists()
