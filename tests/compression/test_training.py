from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from toolkit.compression import batchnorm, compiling, models, steps, training
from toolkit.compression import data as datasets
from toolkit.compression.data import Split
from toolkit.compression.images import Hardware, Images, accuracy, predict
from toolkit.config import Recipe
from toolkit.errors import StageError, UsageError
from toolkit.store import Artifact, Store, Work
from toolkit.workload import Data, Model

META = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
RECIPE = Recipe(epochs=3, batch=16, crop=2)


class Stop(Exception):  # noqa: N818
    pass


def images(count: int, hardware: Hardware) -> Images:
    random = np.random.default_rng(1)
    labels = np.arange(count) % 2
    pixels = random.integers(0, 100, (count, 3, 16, 16)) + 120 * labels[:, None, None, None]
    return Images(Split(pixels.astype(np.uint8), labels.astype(np.int64)), META, hardware)


def fit(folder: Path, epochs: int = 3, **options: Any) -> dict[str, torch.Tensor]:
    return fitted(folder, epochs, **options)[0]


def fitted(folder: Path, epochs: int = 3, **options: Any) -> tuple[dict[str, torch.Tensor], training.Fitted]:
    hardware = Hardware.find()
    network = hardware.place(models.build(Model.parse("resnet20"), 2, seed=5))
    (folder / "resume").mkdir(parents=True, exist_ok=True)
    work = Work(folder, folder / "resume", options.pop("progress", lambda done, total, text: None))
    result = training.fit(
        network,
        images(64, hardware),
        images(20, hardware),
        recipe=options.pop("recipe", RECIPE),
        epochs=epochs,
        base_lr=0.1,
        seed=5,
        hardware=hardware,
        work=work,
        **options,
    )
    return network.state_dict(), result


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    assert same(fit(tmp_path / "a"), fit(tmp_path / "b"))


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_training_continues_to_the_same_weights(tmp_path: Path, after: int) -> None:
    def stop(done: int, total: int, text: str) -> None:
        if done == after:
            raise Stop

    with pytest.raises(Stop):
        fit(tmp_path / "a", progress=stop)
    told: list[str] = []
    continued = fit(tmp_path / "a", progress=lambda done, total, text: told.append(text))
    assert told[0] == f"continues after epoch {after}"
    assert len(told) == 1 + 3 - after
    assert same(continued, fit(tmp_path / "b"))


def test_a_loss_that_is_no_number_stops_with_a_remedy(tmp_path: Path) -> None:
    def nan(logits: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return logits.sum() * float("nan")

    with pytest.raises(StageError, match=r"no longer a number in epoch 1, step 1 of 4$") as error:
        fit(tmp_path, loss=nan)
    assert "recipe.lr 0.1 in the profile instead of 0.2" in str(error.value.hint)


def test_a_loss_that_ceases_to_be_a_number_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    steps = 0

    def breaks(logits: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return torch.nn.functional.cross_entropy(logits, labels) * (float("nan") if steps == 7 else 1)

    with pytest.raises(StageError, match=r"epoch 2, step 3 of 4; what epoch 1 had reached is kept in .*checkpoint"):
        fit(tmp_path, loss=breaks)
    assert same(fit(tmp_path), fit(tmp_path / "whole")), "the same training goes on from there"


def test_a_training_that_suffices_ends_and_says_why(tmp_path: Path) -> None:
    asked: list[float] = []

    def second(score: float) -> bool:
        asked.append(score)
        return len(asked) == 2

    _, result = fitted(tmp_path, stop=second)
    assert len(result.history) == 2
    assert asked == [entry["val"] for entry in result.history]
    assert result.stopped is not None
    assert "suffices" in result.stopped
    assert fitted(tmp_path / "whole", stop=lambda score: False)[1].stopped is None


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([0.2, 0.8, 0.9, 0.85, 0.85], 5),  # 0.067 is the standard error of 18 in 20
        ([0.2, 0.8, 0.9, 0.85, 0.8], 4),
        ([0.9, 0.95, 0.85, 1.0, 0.95], 4),
        ([0.0, 0.0], 2),
    ],
)
def test_the_last_epoch_as_good_as_the_best_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], kept: int
) -> None:
    rest = iter(scores)
    monkeypatch.setattr(training, "accuracy", lambda logits, images: next(rest))
    states: list[dict[str, Any]] = []

    def after(done: int, total: int, text: str) -> None:
        states.append(torch.load(tmp_path / "resume/checkpoint.pt", weights_only=True)["network"])

    state, _ = fitted(tmp_path, len(scores), progress=after)
    assert [number for number, each in enumerate(states, 1) if same(state, each)] == [kept]


def test_a_batch_too_large_for_the_memory_is_halved(tmp_path: Path) -> None:
    def hungry(logits: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) > 4:
            torch.empty(1 << 60)
        return torch.nn.functional.cross_entropy(logits, labels)

    _, result = fitted(tmp_path, epochs=1, loss=hungry)
    assert result.notes == [
        "the memory does not suffice for a batch of 16 images: it is computed in 4 parts, "
        "whose gradients are added up"
    ]
    assert np.isfinite(result.history[0]["loss"])


def test_the_parts_of_a_batch_have_its_gradients_and_its_loss() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
    inputs, labels = torch.randn(11, 3, 8, 8), torch.arange(11) % 5

    def gradients(parts: int) -> list[torch.Tensor]:
        backward = steps.Backward(network, training._cross_entropy, contextlib.nullcontext, 11)
        backward.parts = parts
        value = backward(inputs, labels)
        return [
            value,
            *(parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None),
        ]

    for whole, parts in zip(gradients(1), gradients(3), strict=True):
        torch.testing.assert_close(whole, parts)


def test_no_part_of_a_short_batch_is_empty_or_of_one_image() -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.BatchNorm1d(5))
    backward = steps.Backward(network, training._cross_entropy, contextlib.nullcontext, 16)
    backward.parts = 4
    for images in (3, 5, 6):
        assert backward(torch.randn(images, 3, 2, 2), torch.arange(images) % 5).isfinite()


def test_gradient_checkpointing_keeps_less_and_comes_to_the_same_weights(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"gradient_checkpointing": True})
    assert same(fit(tmp_path / "a", 1), fit(tmp_path / "b", 1, recipe=recipe))
    network, batch = models.build(Model.parse("resnet20"), 2, seed=5), torch.zeros(4, 3, 16, 16)

    def kept() -> int:
        total = 0

        def count(value: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            network(batch)
        return total

    everything = kept()
    with steps.recomputing(network):
        assert kept() < everything / 3
    assert kept() == everything


def test_a_model_without_blocks_has_nothing_to_compute_again() -> None:
    with pytest.raises(UsageError, match=r"no nn\.Sequential of blocks"), steps.recomputing(torch.nn.Flatten()):
        pass


def test_not_even_two_images_is_an_error_with_a_remedy() -> None:
    def hungry(logits: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    backward = steps.Backward(torch.nn.Flatten(), hungry, contextlib.nullcontext, 8)
    with pytest.raises(StageError, match="two images at once"):
        backward(torch.zeros(8, 3, 4, 4), torch.zeros(8, dtype=torch.int64))
    assert backward.parts == 4


def test_recalibration_takes_the_statistics_of_the_images() -> None:
    hardware = Hardware(torch.device("cpu"), bf16=False)
    some = images(200, hardware)
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5), torch.nn.BatchNorm2d(3))
    batchnorm.recalibrate(network, batchnorm.calibration(some, Recipe(crop=0)))
    torch.testing.assert_close(network[0].running_mean, some.normalise(some.images).mean((0, 2, 3)))
    assert network[0].momentum == 0.1
    assert network[2].running_mean.abs().max() < 1e-2, "nothing was dropped"


def test_recalibration_augments_images_as_training_does() -> None:
    some = images(400, Hardware(torch.device("cpu"), bf16=False))
    recipe = Recipe(crop=4, cutout=6, batch=50)
    norm = torch.nn.BatchNorm2d(3, momentum=None)
    for inputs, _ in some.augmented(recipe, torch.Generator().manual_seed(7), some.size):
        norm(inputs)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    assert (mean - some.normalise(some.images).mean((0, 2, 3))).abs().max() > 0.3, "borders are black"
    batchnorm.recalibrate(norm, batchnorm.calibration(some, recipe))
    torch.testing.assert_close(norm.running_mean, mean, atol=0.05, rtol=0)
    torch.testing.assert_close(norm.running_var, var, atol=0, rtol=0.05)
    for one, other in zip(batchnorm.calibration(some, recipe), batchnorm.calibration(some, recipe), strict=True):
        assert torch.equal(one, other), "candidates are told apart by themselves alone"


def test_compiling_is_measured_once_and_then_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    before = copy.deepcopy(network.state_dict())
    batch = torch.randn(8, 3, 8, 8), torch.arange(8)
    backward = steps.Backward(network, training._cross_entropy, contextlib.nullcontext, 8)
    compiled: list[torch.nn.Module] = []
    told: list[str] = []

    def compile_(network: torch.nn.Module, programs: Path) -> Any:
        compiled.append(network)
        return network.forward

    def choose(total: int) -> Any:
        return compiling.choose(network, backward, batch, total, tmp_path, told.append)

    monkeypatch.setattr(compiling, "_compile", compile_)
    assert choose(10) is network, "nothing so short is worth a try"
    assert not compiled
    monkeypatch.setattr(compiling, "_WORTH_A_TRY", 0.0)
    choose(1)
    assert len(compiled) == 1
    assert same(before, network.state_dict())
    assert all(parameter.grad is None for parameter in network.parameters())
    (record,) = tmp_path.glob("*.json")
    record.write_text('{"plain": 2.0, "compiled": 1.0, "compiling": 50.0}')
    told.clear()
    assert choose(51) is not network
    assert choose(50) is network
    assert told == [
        "compiles the network",
        "compiled: 1000 instead of 2000 ms a step, and 50 s to compile",
        "not compiled: 1000 instead of 2000 ms a step, and 50 s to compile",
    ]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_computes_the_same_and_its_programs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "set back afterwards")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    inputs = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiling._compile(network, tmp_path)(inputs), network(inputs))
    assert list(tmp_path.rglob("*.so"))


def test_without_a_compiler_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    network = torch.nn.Flatten()
    backward = steps.Backward(network, training._cross_entropy, contextlib.nullcontext, 2)
    assert compiling.choose(network, backward, (torch.zeros(2), torch.zeros(2)), 10**9, tmp_path, print) is network


def test_augmentation_shifts_and_flips_whole_images() -> None:
    hardware = Hardware(torch.device("cpu"), bf16=False)
    pixels = np.zeros((40, 3, 8, 8), np.uint8)
    pixels[:, :, 3, 2] = 200
    few = Images(Split(pixels, np.zeros(40, np.int64)), {"mean": [0] * 3, "std": [1] * 3}, hardware)
    places = set()
    for inputs, _ in few.augmented(Recipe(batch=16, crop=2, flip=True), torch.Generator().manual_seed(0), 8):
        for image in inputs:
            ((row, column),) = (image[0] > 0).nonzero().tolist()
            assert torch.equal(image[0], image[2])
            places.add((row, column))
    rows, columns = {row for row, _ in places}, {column for _, column in places}
    assert rows <= set(range(1, 6))
    assert columns <= {0, 1, 2, 3, 4} | {3, 4, 5, 6, 7}
    assert len(places) > 10


def test_cutout_blanks_a_square_around_any_pixel_of_each_image_and_moves_nothing_else() -> None:
    some = images(64, Hardware(torch.device("cpu"), bf16=False))
    whole, cut = (
        torch.cat([inputs for inputs, _ in some.augmented(recipe, torch.Generator().manual_seed(3), 16)])
        for recipe in (Recipe(batch=16), Recipe(batch=16, cutout=3))
    )
    blank = (cut == 0).all(1)
    assert torch.equal(cut, whole.masked_fill(blank[:, None], 0))
    edge = blank.shape[-1] - 1
    for square in blank:
        rows, columns = square.any(1).nonzero().flatten().tolist(), square.any(0).nonzero().flatten().tolist()
        assert square.sum() == len(rows) * len(columns)
        for side in (rows, columns):  # a square around a pixel at the edge is less than whole
            assert len(side) == 3 or (len(side) == 2 and (side[0] == 0 or side[-1] == edge))
    assert len({tuple(square.flatten().tolist()) for square in blank}) > 16


def test_small_crops_are_windows_of_every_part_of_an_image() -> None:
    hardware = Hardware(torch.device("cpu"), bf16=False)
    position = np.arange(256).reshape(1, 1, 16, 16)
    some = Images(
        Split(np.tile(position, (60, 3, 1, 1)).astype(np.uint8), np.zeros(60, np.int64)),
        {"mean": [0] * 3, "std": [1] * 3},
        hardware,
    )
    corners = set()
    for inputs, _ in some.augmented(Recipe(crop=0, flip=False), torch.Generator().manual_seed(3), 12):
        assert inputs.shape == (60, 3, 12, 12)
        for image in (inputs * 255).round().long():
            row, column = divmod(image[0, 0, 0].item(), 16)
            assert torch.equal(image[2], torch.from_numpy(position[0, 0, row : row + 12, column : column + 12]))
            corners.add((row, column))
    assert {row for row, _ in corners} == {column for _, column in corners} == set(range(5))


def test_training_on_small_crops_ends_on_whole_images_and_continues_to_the_same_weights(tmp_path: Path) -> None:
    sizes: list[int] = []

    def loss(logits: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        sizes.append(inputs.shape[-1])
        return torch.nn.functional.cross_entropy(logits, labels)

    def stop(done: int, total: int, text: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        fit(tmp_path / "a", progress=stop, small=2)
    continued = fit(tmp_path / "a", small=2)
    assert same(continued, fit(tmp_path / "b", small=2, loss=loss))
    assert sizes == 8 * [12] + 4 * [16]
    assert Recipe(epochs=70, small_crops=0.6).small_epochs == 42


def test_small_crops_do_not_go_through_a_network_compiled_for_whole_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def choose(network: torch.nn.Module, backward: object, batch: object, steps: int, *_: object) -> Any:
        assert steps == 4, "what is compiled has to pay back in the last epoch"

        def run(inputs: torch.Tensor) -> Any:
            sizes.append(inputs.shape[-1])
            return network(inputs)

        return run

    monkeypatch.setattr(compiling, "choose", choose)
    fit(tmp_path, small=2, programs=tmp_path)
    assert sizes == 4 * [16]


def test_without_augmentation_every_image_comes_once_and_whole() -> None:
    hardware = Hardware(torch.device("cpu"), bf16=False)
    some = images(37, hardware)
    recipe = Recipe(batch=9, crop=0, flip=False)
    inputs, labels = zip(*some.augmented(recipe, torch.Generator().manual_seed(3), 16), strict=True)
    seen = torch.cat(inputs)
    expected = some.normalise(some.images)
    assert len(seen) == 36  # the last single image has no batch to be normalised in
    found = {image.numpy().tobytes() for image in seen.contiguous()}
    assert found <= {image.numpy().tobytes() for image in expected.contiguous()}
    assert len(torch.cat(labels)) == 36


class Tied(torch.nn.Module):
    """Two layers that are one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(3, 10)
        self.two = self.one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x.mean((2, 3))) + self.two(x.amax((2, 3)))


def test_shared_weights_are_saved_validated_as_they_are_and_trained_on_small_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(stage: str, make: Callable[[Work], dict[str, Any]]) -> Artifact:
        return Store(tmp_path / "store").produce(stage, stage, make, config={}, inputs={})

    monkeypatch.setattr(models, "build", lambda *_, **__: Tied())
    model = Model.parse("resnet20")
    data = made("data", lambda work: datasets.prepare(work, Data.parse("digits"), 8, tmp_path))
    baseline = made("train", lambda work: training.train(work, data, model, Recipe(epochs=0), 1))
    assert baseline.meta["history"] == []
    assert 0 < baseline.meta["val"] < 1
    network = training.load_baseline(baseline, data, model)
    hardware = Hardware.find()
    val = Images(datasets.load(data, "val"), data.meta, hardware)
    assert accuracy(predict(hardware.place(network), val), val) == baseline.meta["val"]

    sizes: list[int] = []
    augmented = Images.augmented
    monkeypatch.setattr(
        Images, "augmented", lambda self, *given: sizes.append(given[-1]) or augmented(self, *given)
    )
    recipe = Recipe(epochs=3, small_crops=0.67, train_images=64)
    made("train again", lambda work: training.train(work, data, model, recipe, 1))
    assert sizes == [6, 6, 8]


def test_learning_rate_warms_up_and_goes_down_to_nothing() -> None:
    recipe = Recipe(batch=256, warmup=0.1)
    rates = [training.learning_rate(step, 100, recipe, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == pytest.approx(0.2)
    assert rates[-1] < 1e-3
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_fine_tuning_starts_from_the_rate_that_training_had_so_many_epochs_before_its_end() -> None:
    recipe = Recipe(epochs=100, finetune_epochs=20, warmup=0.05)
    assert training.rewound(recipe) == pytest.approx(training.learning_rate(80, 100, recipe, recipe.lr), rel=0.15)
    rates = [training.rewound(Recipe(epochs=epochs, finetune_epochs=8, lr=0.3)) for epochs in (0, 4, 8, 16, 17, 60)]
    assert rates[:4] == pytest.approx([0.15] * 4), "at most half"
    assert 0.15 > rates[4] > rates[5] > 0


def test_accuracy_counts_every_image() -> None:
    hardware = Hardware(torch.device("cpu"), bf16=False)
    some = images(21, hardware)

    class Bright(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bright = x.mean((1, 2, 3))
            return torch.stack([-bright, bright - 2 * x.mean()], 1)

    assert accuracy(predict(Bright(), some), some) == 1.0
