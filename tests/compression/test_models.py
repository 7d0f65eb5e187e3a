from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file

from toolkit.compression import models, pruning, sources
from toolkit.errors import StageError, UsageError
from toolkit.workload import Model

FACTORY = """\
import torch
from helper import WIDTH
def build(num_classes): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, num_classes))
def plain(): return torch.nn.Identity()
def fails(num_classes): raise RuntimeError("no luck")
def number(num_classes): return 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(FACTORY)
    (tmp_path / "helper.py").write_text("WIDTH = 1\n")
    (tmp_path / "broken.py").write_text("import does_not_exist\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine", "helper", "broken"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    return tmp_path


def test_resnet20_is_the_published_one() -> None:
    network = models.build(Model.parse("resnet20"), 10, seed=1)
    assert models.parameters(network) == 269_722
    models.check(network, "resnet20", 32, 10)


def test_equal_seeds_give_equal_weights() -> None:
    first, second, other = (models.build(Model.parse("resnet20"), 10, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_torchvision_with_its_head_fitted() -> None:
    network = models.build(Model.parse("torchvision:mobilenet_v3_small"), 7, seed=0)
    models.check(network, "mobilenet_v3_small", 32, 7)


def test_torchvision_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="resnet17") as error:
        models.build(Model.parse("torchvision:resnet17"), 7, seed=0)
    assert "resnet18" in str(error.value.hint)


@pytest.mark.usefixtures("here")
def test_a_factory_of_the_users() -> None:
    network = models.build(Model.parse("mine:build"), 5, seed=0)
    models.check(network, "mine:build", 8, 5)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken:build", "does not import: ModuleNotFoundError"),
        ("mine:biuld", "has no function 'biuld'"),
        ("mine:fails", "failed: RuntimeError: no luck"),
        ("mine:number", "returned int, not a torch.nn.Module"),
    ],
)
def test_what_is_wrong_with_a_factory(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        models.build(Model.parse(name), 5, seed=0)


@pytest.mark.usefixtures("here")
def test_a_network_that_does_not_fit_the_data() -> None:
    with pytest.raises(UsageError, match="does not accept images of 3×16×16"):
        models.check(models.build(Model.parse("mine:build"), 5, seed=0), "mine:build", 16, 5)
    with pytest.raises(UsageError, match="instead of \\(2, 5\\)"):
        models.check(models.build(Model.parse("mine:plain"), 5, seed=0), "mine:plain", 8, 5)
    with pytest.raises(UsageError, match="does not accept images of 3×6×6") as error:
        models.check(models.build(Model.parse("mine:build"), 5, seed=0), "mine:build", 8, 5, small=6)
    assert "leave recipe.small_crops out" in str(error.value.hint)


def test_a_factory_is_identified_by_its_code_and_what_it_imports(here: Path) -> None:
    model = Model.parse("mine:build")
    before = sources.identify(model)
    assert sources.identify(model) == before
    (here / "helper.py").write_text("WIDTH = 2\n")
    assert sources.identify(model) != before
    with pytest.raises(UsageError, match="'nowhere' cannot be found"):
        sources.identify(Model.parse("nowhere:build"))
    for name, text, says in (
        ("raises", "raise ValueError('boo')", "does not import: ValueError: boo"),
        ("lacks", "import nosuchlib", "does not import: No module named 'nosuchlib'"),
    ):
        (here / name).mkdir()
        (here / name / "__init__.py").write_text(text)
        with pytest.raises(UsageError, match=says):
            sources.identify(Model.parse(f"{name}.net:build"))


@pytest.mark.parametrize("form", ["safetensors", "state_dict", "wrapped", "parallel"])
def test_weights(tmp_path: Path, form: str) -> None:
    trained = models.build(Model.parse("resnet20"), 4, seed=7).state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(trained, path)
    elif form == "parallel":
        torch.save({f"module.{key}": value for key, value in trained.items()}, path)
    else:
        torch.save({"state_dict": trained} if form == "wrapped" else trained, path)
    loaded = models.build(Model.parse("resnet20", str(path)), 4, seed=1).state_dict()
    assert all(torch.equal(loaded[key], trained[key]) for key in trained)


def test_a_checkpoint_that_does_not_fit_is_explained(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(16, 3, 5, 5)}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"'bn1.weight' is missing") as error:
        models.build(Model.parse("resnet20", str(tmp_path / "w.pt")), 10, seed=1)
    assert "more" in error.value.message


def test_the_classifier_of_other_classes_starts_anew_but_not_a_teachers(tmp_path: Path) -> None:
    trained = models.build(Model.parse("resnet20"), 4, seed=7).state_dict()
    torch.save(trained, tmp_path / "w.pt")
    model = Model.parse_teacher(f"resnet20={tmp_path / 'w.pt'}")
    fresh = models.build(Model.parse("resnet20"), 10, seed=1).state_dict()
    for key, tensor in models.build(model, 10, seed=1).state_dict().items():
        assert torch.equal(tensor, (fresh if key.startswith("fc.") else trained)[key]), key
    assert torch.equal(models.build_teacher(model, 4).state_dict()["fc.weight"], trained["fc.weight"])
    with pytest.raises(UsageError, match=r"'fc.weight' is \(4, 64\) instead of \(10, 64\)"):
        models.build_teacher(model, 10)


class Unusual(torch.nn.Module):
    """Two channels out of each, a buffer that is not saved, a normalisation without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.doubled = torch.nn.Conv2d(16, 32, 3, padding=1, groups=16)
        self.norm = torch.nn.LayerNorm([8, 8], elementwise_affine=False)
        self.fc = torch.nn.Linear(32, 2)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.doubled(self.conv(x))).amax((2, 3))
        logits: torch.Tensor = self.fc(features) * self.scale
        return logits


def test_layers_of_every_kind_are_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Unusual()
    models.save(network, tmp_path / "model.pth")
    monkeypatch.setattr(models, "_fresh", lambda *_, **__: Unusual())
    restored = models.restore(Model.parse("resnet20"), 2, tmp_path / "model.pth")
    inputs = torch.randn(4, 3, 8, 8)
    assert torch.equal(restored(inputs), network(inputs))


def test_torchvisions_weights_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str, *args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    model = Model.parse("torchvision:mobilenet_v3_small", "torchvision")
    with pytest.raises(
        StageError, match=r"weights of mobilenet_v3_small cannot be downloaded: .*not known"
    ) as error:
        models.build(model, 7, 0, tmp_path)
    assert error.value.hint is not None
    url, folder = re.findall(r"bring (\S+) to (\S+),", error.value.hint)[0]
    assert folder == str(tmp_path)
    asked = SimpleNamespace(meta={"input_size": 32, "classes": list("abc")})
    with pytest.raises(StageError, match="weights of mobilenet_v3_small cannot be downloaded"):
        pruning.check(asked, Model.parse("resnet20"), 8, "fastnas", tmp_path, model)  # type: ignore[arg-type]

    imagenet = models.build(Model.parse("torchvision:mobilenet_v3_small"), 1000, seed=3).state_dict()
    torch.save(imagenet, tmp_path / Path(url).name)
    started = models.build(model, 7, 0, tmp_path).state_dict()
    assert torch.equal(started["features.0.0.weight"], imagenet["features.0.0.weight"])
    assert started["classifier.3.weight"].shape == (7, 1024)
    assert sources.identify(model) != sources.identify(Model.parse("torchvision:mobilenet_v3_small"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchvision:resnet50=", "'' is not a file"),
        ("resnet20=nowhere.pt", "'nowhere.pt' is not a file"),
        ("resnet21", "no model is called 'resnet21'"),
        (f"onnx:net.onnx={__file__}", "an ONNX file cannot teach"),
        (f"resnet21={__file__}", "no model is called 'resnet21'"),
    ],
)
def test_what_is_wrong_with_a_teacher(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Model.parse_teacher(text)


def test_a_teacher_without_a_checkpoint_begins_with_torchvisions_weights_if_it_has_some() -> None:
    assert Model.parse_teacher("torchvision:resnet50") == Model.parse("torchvision:resnet50", "torchvision")
    assert Model.parse_teacher("resnet20") == Model.parse("resnet20")


def test_only_torchvisions_models_have_its_weights() -> None:
    with pytest.raises(UsageError, match="torchvision has no weights of 'resnet20'"):
        Model.parse("resnet20", "torchvision")


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save(models.build(Model.parse("resnet20"), 4, seed=7), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="cannot be read"):
        models.build(Model.parse("resnet20", str(tmp_path / "w.pt")), 4, seed=1)


def test_a_missing_checkpoint() -> None:
    with pytest.raises(UsageError, match="is not a file"):
        Model.parse("resnet20", "nowhere.pt")
