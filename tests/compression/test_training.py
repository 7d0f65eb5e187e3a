from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from toolkit.compression import models, training
from toolkit.compression.data import Split
from toolkit.config import Model, Recipe
from toolkit.errors import StageError
from toolkit.store import Work

META = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
RECIPE = Recipe(epochs=3, batch=16, crop=2)


class Stop(Exception):  # noqa: N818
    pass


def images(count: int, hardware: training.Hardware) -> training.Images:
    random = np.random.default_rng(1)
    labels = np.arange(count) % 2
    pixels = random.integers(0, 100, (count, 3, 16, 16)) + 120 * labels[:, None, None, None]
    return training.Images(Split(pixels.astype(np.uint8), labels.astype(np.int64)), META, hardware)


def fit(folder: Path, epochs: int = 3, **options: Any) -> dict[str, torch.Tensor]:
    hardware = training.Hardware.find()
    network = hardware.place(models.build(Model.parse("resnet20"), 2, seed=5))
    (folder / "resume").mkdir(parents=True, exist_ok=True)
    work = Work(folder, folder / "resume", options.pop("progress", lambda done, total, text: None))
    training.fit(
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
    return network.state_dict()


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

    with pytest.raises(StageError, match="no longer a number in epoch 1") as error:
        fit(tmp_path, loss=nan)
    assert "learning rate" in str(error.value.hint)


def test_augmentation_shifts_and_flips_whole_images() -> None:
    hardware = training.Hardware(torch.device("cpu"), bf16=False)
    pixels = np.zeros((40, 3, 8, 8), np.uint8)
    pixels[:, :, 3, 2] = 200
    few = training.Images(Split(pixels, np.zeros(40, np.int64)), {"mean": [0] * 3, "std": [1] * 3}, hardware)
    places = set()
    for inputs, _ in few.augmented(Recipe(batch=16, crop=2, flip=True), torch.Generator().manual_seed(0)):
        for image in inputs:
            ((row, column),) = (image[0] > 0).nonzero().tolist()
            assert torch.equal(image[0], image[2])
            places.add((row, column))
    rows, columns = {row for row, _ in places}, {column for _, column in places}
    assert rows <= set(range(1, 6))
    assert columns <= {0, 1, 2, 3, 4} | {3, 4, 5, 6, 7}
    assert len(places) > 10


def test_without_augmentation_every_image_comes_once_and_whole() -> None:
    hardware = training.Hardware(torch.device("cpu"), bf16=False)
    some = images(37, hardware)
    recipe = Recipe(batch=9, crop=0, flip=False)
    inputs, labels = zip(*some.augmented(recipe, torch.Generator().manual_seed(3)), strict=True)
    seen = torch.cat(inputs)
    expected = some.normalise(some.images)
    assert len(seen) == 36  # the last single image has no batch to be normalised in
    found = {image.numpy().tobytes() for image in seen.contiguous()}
    assert found <= {image.numpy().tobytes() for image in expected.contiguous()}
    assert len(torch.cat(labels)) == 36


def test_learning_rate_warms_up_and_goes_down_to_nothing() -> None:
    recipe = Recipe(batch=256, warmup=0.1)
    rates = [training.learning_rate(step, 100, recipe, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == pytest.approx(0.2)
    assert rates[-1] < 1e-3
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_accuracy_counts_every_image() -> None:
    hardware = training.Hardware(torch.device("cpu"), bf16=False)
    some = images(21, hardware)

    class Bright(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bright = x.mean((1, 2, 3))
            return torch.stack([-bright, bright - 2 * x.mean()], 1)

    assert training.accuracy(training.predict(Bright(), some), some) == 1.0
