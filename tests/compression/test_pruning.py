from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.compression import budget, fastnas, flops, models, pruning
from toolkit.config import Flops
from toolkit.errors import UsageError
from toolkit.store import Store, Work
from toolkit.workload import Model


def test_flops_are_two_macs_without_batch_norm() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 5),
    )
    conv, linear = 16 * 16 * 8 * 3 * 9, 8 * 5
    assert flops.flops(network, 16) == pytest.approx(2 * (conv + linear), rel=0.01)


def test_both_generations_of_torchprofile_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchprofile import profile

    network = models.build(Model.parse("resnet20"), 10, seed=0)
    expected = flops.flops(network, 32)

    def old_profile(model: Any, args: Any = (), kwargs: Any = None) -> int:
        """Count as torchprofile 0.0.4 does: by a list of handlers."""
        total = 0
        for node in profile.trace(model, args, kwargs).nodes:
            for names, handler in profile.handlers:
                if node.operator in ([names] if isinstance(names, str) else names):
                    total += handler(node) if handler else 0
                    break
        return total

    handlers = tuple(((name,), handler) for name, handler in profile.HANDLER_MAP.items())
    monkeypatch.setattr(profile, "handlers", handlers, raising=False)
    monkeypatch.setattr(profile, "profile_macs", old_profile)
    monkeypatch.delattr(profile, "HANDLER_MAP")
    assert flops.flops(network, 32) == expected
    assert profile.handlers == handlers


@pytest.mark.parametrize(("divisor", "share"), [(16, 0.60), (8, 0.31)])
def test_reach_of_resnet20(divisor: int, share: float) -> None:
    found = pruning.reach(models.build(Model.parse("resnet20"), 10, seed=0), "resnet20", 32, divisor, "fastnas")
    assert found.flops == 81_102_208
    assert found.smallest / found.flops == pytest.approx(share, abs=0.01)


class Branching(torch.nn.Module):
    """Python control flow on values: nothing can trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 32, 3)
        self.other = torch.nn.Conv2d(32, 32, 3)
        self.fc = torch.nn.Linear(32, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv(x)
        if out.mean() > 0:
            out = self.other(out)
        return self.fc(out.mean((2, 3)))


def test_a_network_that_cannot_be_traced_is_told_so() -> None:
    with pytest.raises(UsageError, match="FastNAS cannot trace the model 'mine'"):
        pruning.reach(Branching(), "mine", 16, 16, "fastnas")


CHECK = {"flops": 100e6, "smallest": 40e6, "obstacle": None}


def test_an_unreachable_budget_names_the_smallest() -> None:
    with pytest.raises(UsageError, match=r"40 MFLOPs \(40.0% of 100 MFLOPs\)") as error:
        budget.require_reachable(CHECK, Flops.parse("30%"), 16)
    assert "--flops 40%" in str(error.value.hint)
    budget.require_reachable(CHECK, Flops.parse("40M"), 16)


def test_a_network_that_cannot_be_pruned_can_be_kept_whole() -> None:
    check = {"flops": 100e6, "smallest": None, "obstacle": "cannot trace"}
    budget.require_reachable(check, Flops.parse("100%"), 16)
    with pytest.raises(UsageError, match="cannot trace"):
        budget.require_reachable(check, Flops.parse("99%"), 16)


def test_the_pruned_network_keeps_the_budget_and_is_restored_whole(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, document = finished
    model = document["model"]
    assert model["pruned"]["flops"] <= 0.8 * model["baseline"]["flops"]
    assert model["final"]["flops"] == model["pruned"]["flops"]
    store = Store(folder / "build" / "store")
    artifact = store.lookup("prune", document["artifacts"]["prune"])
    assert artifact is not None
    restored = models.restore(Model.parse("resnet20"), 10, artifact.file("model.pth"))
    assert flops.flops(restored, 16) == model["pruned"]["flops"]
    assert any(after < before for before, after in artifact.meta["widths"].values())
    assert all(after % 16 == 0 for before, after in artifact.meta["widths"].values() if after != before)
    assert list((store.root / ".search").glob("*.pth")), "the search is kept for other budgets"


def test_a_finished_search_is_taken_over_and_half_a_one_is_dropped(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (shared,) = (finished[0] / "build" / "store" / ".search").glob("*.pth")
    work = Work(tmp_path / "out", tmp_path)
    own = fastnas._open_search(work, shared)
    assert len(torch.load(own, weights_only=True)["sensitivity_map"]) == 6
    half = tmp_path / "half.pth"
    half.write_bytes(shared.read_bytes()[:1000])
    assert not fastnas._open_search(work, half).exists()


def test_nothing_here_knows_what_an_engine_is() -> None:
    package = Path(pruning.__file__).parent
    known = set()
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                known |= {f"{node.module}.{alias.name}".split(".")[1] for alias in node.names}
    assert "compression" in known
    assert not known & {"engines", "devices", "delivery", "containers", "pipeline", "measurement"}
