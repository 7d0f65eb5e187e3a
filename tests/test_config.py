from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.conftest import job_of
from toolkit import config, files, workload
from toolkit.config import Flops
from toolkit.errors import UsageError
from toolkit.workload import Model


@pytest.mark.parametrize("kind", ["profiles", "targets"])
def test_every_shipped_file_is_valid(kind: str) -> None:
    names = files.names(kind)
    assert set(names) >= {"a100", "t4", "jetson-orin", "jetson-orin-nano", "jetson-thor", "host-cpu"}
    for name in names:
        if kind == "profiles":
            files.load_profile(name)
        else:
            files.load_profile(files.load_target(name).profile)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flops: 60%\nflopps: 1\n", ":2: unknown key 'flopps'; did you mean 'flops'?"),
        ("flops: 60%\ncontract:\n  latency_p9: 2 ms\n", ":3: unknown key 'contract.latency_p9'; did you mean"),
        ("flops: 60%\ncontract:\n  latency_p99: 2\n", ":3: contract.latency_p99: 2 has no unit"),
        ("flops: 60%\ncontract:\n  latency_p99: 2 MB\n", ":3: contract.latency_p99: unit 'MB' is not known here"),
        ("flops: lots\n", ":1: flops: 'lots' is not a number"),
        ("flops: 60%\nrecipe:\n  epochs: twelve\n", ":3: recipe.epochs: input should be a valid integer"),
        (
            "flops: 60%\nrecipe:\n  train_images: 1\n",
            ":3: recipe.train_images: input should be greater than or equal",
        ),
        ("flops: 60%\nprecision: fp4\n", ":2: precision: input should be 'fp32', 'fp16', 'int8' or 'fp8'"),
        ("precision: fp32\n", ":1: the key 'flops' is missing"),
        ("flops: 60%\nflops: 50%\n", ":2: 'flops' stands here a second time"),
        ("flops: [60%\n", ":2: "),
        ("flops: 60%\n\x01: x\n", "special characters are not allowed"),
        ("- a\n- b\n", ":1: a table of keys is expected"),
        ("name: x\nflops: 60%\n", ":1: 'name' is the file's own name"),
        ("flops: 60%\nrecipes: {digits: {epoch: 2}}\n", "a recipe has no key 'epoch'; did you mean 'epochs'?"),
        ("flops: 60%\nrecipes: {digit: {epochs: 2}}\n", "no data set is called 'digit'; did you mean 'digits'?"),
        ("flops: 60%\nbenchmark:\n  batches: [1, 0]\n", ":3: benchmark.batches.1"),
        (
            "flops: 60%\ncontract:\n  power: 10 mJ\n",
            ":3: contract.power: unit 'mJ' is not known here; write one of W",
        ),
        ("flops: 60%\ncontract:\n  confidence: 100 %\n", ":3: contract.confidence: input should be less than 1"),
        ("flops: 60%\ncontract: {scenario: DutyCycle}\n", ":1: a contract on DutyCycle needs"),
    ],
)
def test_what_is_wrong_in_a_profile_is_named_with_file_and_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        files.read_file(config.Profile, path)
    assert error.value.message.startswith(str(path))
    assert expected in error.value.message
    assert error.value.hint


def test_a_word_is_no_truth_value(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    t4 = files.names("targets")["t4"].read_text()
    path.write_text(t4.replace("build:\n", "build:\n  on: no\n"))
    assert files.read_file(config.Target, path).build.on == "no"
    path.write_text("flops: 60%\nrecipe: {flip: false, teacher: true}\n")
    recipe = files.read_file(config.Profile, path).recipe
    assert (recipe.flip, recipe.teacher) == (False, True)


@pytest.mark.parametrize(("kind", "model"), [("profiles", config.Profile), ("targets", config.Target)])
def test_every_key_is_explained(kind: str, model: type[BaseModel]) -> None:
    text = (next(iter(files.names(kind).values())).parent / "README.md").read_text()
    missing = [key for key in keys(model) if f"`{key}`" not in text and f".{key}`" not in text]
    assert not missing


def keys(model: type[BaseModel]) -> Iterator[str]:
    """Yield the keys that a file has, those of the tables in it among them."""
    for key, field in model.model_fields.items():
        table = field.annotation
        if isinstance(table, type) and issubclass(table, config.Strict) and table is not Flops:
            yield from keys(table)
        elif key != "name":
            yield key


def test_the_working_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "t4.yaml").write_text("flops: 12%\n")
    monkeypatch.chdir(tmp_path)
    assert str(files.load_profile("t4").flops) == "12%"


def test_a_profile_survives_being_shown_and_read_again(tmp_path: Path) -> None:
    import yaml

    before = files.load_profile("jetson-orin")
    path = tmp_path / "jetson-orin.yaml"
    path.write_text(yaml.safe_dump(before.model_dump(mode="json", exclude={"name"}, exclude_none=True)))
    assert files.read_file(config.Profile, path) == before


def test_recipes_are_layered_and_fast_shortens() -> None:
    profile = config.Profile(name="x", flops="50%", recipes={"digits": {"epochs": 7, "flip": False}})
    assert profile.recipe_for("cifar10", fast=False).epochs == 120
    digits = profile.recipe_for("digits", fast=True)
    assert (digits.epochs, digits.flip, digits.finetune_epochs, digits.train_images) == (7, False, 8, 12_000)
    assert (digits.weight_decay, digits.crop) == (1e-3, 2)


@pytest.mark.parametrize("text", ["60M", "75%", "1.2G"])
def test_budget_round_trip(text: str) -> None:
    assert str(config.Flops.parse(text)) == text


def test_budget_resolves() -> None:
    assert config.Flops.parse("75%").resolve(80e6) == 60e6
    assert config.Flops.parse("60M").resolve(80e6) == 60e6


@pytest.mark.parametrize("text", ["resnet21", "torchvision:", "a b:c", "mod:", "onnx:"])
def test_unknown_model(text: str) -> None:
    with pytest.raises(UsageError, match="no model is called"):
        workload.Model.parse(text)


@pytest.mark.parametrize("text", ["digit", "imagefolder", "imagefolder:", "cifar10:x", "inputs", "none:x"])
def test_unknown_data(text: str) -> None:
    with pytest.raises(UsageError, match="no data set is called"):
        workload.Data.parse(text)


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ((None, None, "0,1"), (0,), (1,)),
        ((None, None, "0,255"), (0,), (1 / 255,)),
        ((None, None, "-1,1"), (0.5,), (0.5,)),
        (("0.5", "0.25,0.25,0.2", None), (0.5,), (0.25, 0.25, 0.2)),
    ],
)
def test_a_range_is_a_mean_and_a_std(
    options: tuple[str | None, str | None, str | None], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    assert workload.Normalization.parse(*options) == workload.Normalization(mean=mean, std=std)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("0.5", None, None), "--mean and --std go together"),
        (("0.5", "0.5", "0,1"), "--input-range stands beside"),
        (("0.5,0.5", "0.5", None), "--mean 0.5,0.5 is not one number or three"),
        (("0.5", "half", None), "--std half is not one number"),
        (("0.5", "0", None), "not of pixel values between 0 and 1"),
        (("123.7,116.3,103.5", "58.4,57.1,57.4", None), "not of pixel values between 0 and 1"),
        (("nan", "0.5", None), "not of pixel values between 0 and 1"),
    ],
)
def test_a_wrong_normalisation(options: tuple[str | None, str | None, str | None], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        workload.Normalization.parse(*options)
    assert error.value.hint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("power_mode: [MAXN]", "power_mode: input should be a valid string"),
        ("power_mode: true", "power_mode: input should be a valid string"),
        ("clocks: high", "clocks: input should be 'locked'"),
        ("sudo: 1", "sudo: input should be a valid boolean"),
    ],
)
def test_a_wrong_power_mode_or_clocks(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "orin.yaml"
    path.write_text(f"profile: jetson-orin\nruntime: onnxruntime\n{line}\n")
    with pytest.raises(UsageError, match=message):
        files.read_file(config.Target, path)
    path.write_text("profile: jetson-orin\nruntime: onnxruntime\npower_mode: 0\n")
    assert files.read_file(config.Target, path).power_mode == "0"


def test_weights_shorten_the_recipe_and_never_lengthen_it() -> None:
    profile = config.Profile(
        name="p", flops="50%", recipe=config.Recipe(epochs=200, lr=0.1), transfer={"epochs": 40}
    )
    started = profile.recipe_for("digits", fast=False, transfer=True)
    assert (started.epochs, started.lr) == (40, 0.02)
    assert started.optimizer == "sgd"
    changed = {"epochs", "lr", "optimizer"}
    assert started.model_dump(exclude=changed) == profile.recipe.model_dump(exclude=changed)
    kept = config.Profile(name="p", flops="50%", recipe=config.Recipe(epochs=0))
    assert kept.recipe_for("digits", fast=True, transfer=True).epochs == 0, "the weights as they are"


def test_a_teacher_is_trained_by_its_own_recipe_unless_it_brings_its_weights(tmp_path: Path) -> None:
    alone = job_of(tmp_path, data="cifar10")
    assert alone.teacher_recipe is None
    taught = replace(alone, teacher=Model.parse_teacher("torchvision:resnet50"))
    assert (taught.recipe.epochs, taught.recipe.lr) == (28, 0.2)
    assert taught.teacher_recipe == alone.profile.recipe_for("cifar10", fast=False, transfer=True)
    weights = tmp_path / "w.pt"
    weights.touch()
    started = replace(taught, model=Model.parse("resnet20", str(weights)), teacher=Model.parse_teacher("resnet20"))
    assert started.teacher_recipe == alone.recipe
    assert started.recipe == taught.teacher_recipe
    shortened = started.trained_by(finetune_epochs=1)
    assert shortened.recipe.finetune_epochs == 1
    assert shortened.teacher_recipe == alone.recipe.model_copy(update={"finetune_epochs": 1})
    assert replace(started, teacher=Model.parse_teacher(f"resnet20={weights}")).teacher_recipe is None
    with pytest.raises(UsageError, match="0 epochs, so that the teacher knows nothing"):
        started.trained_by(epochs=0)
