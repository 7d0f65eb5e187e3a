"""Releases by hand: listed, gone back to, pruned; the agent is the zipapp that travels, the engines are real."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from tests.conftest import TARGET, run_toolkit
from toolkit import pipeline
from toolkit.agent import releases
from toolkit.agent.releases import identity
from toolkit.delivery import release as delivery
from toolkit.delivery import upkeep
from toolkit.delivery.release import Pushed, Release
from toolkit.devices.agent import Agent
from toolkit.devices.local import LocalDevice
from toolkit.errors import StageError
from toolkit.report import document


@pytest.fixture
def root(finished_copy: Path) -> Path:
    """Where the finished job's device keeps its one release, which is current."""
    return finished_copy / "build" / "devices" / "tiny"


@pytest.fixture
def agent(root: Path) -> Agent:
    return Agent(LocalDevice(root))


def another(root: Path, seed: int, model: bytes | None = None) -> Release:
    """Return the current release with another seed, and with other bytes for its engine if they are given."""
    current = (root / "current").resolve()
    manifest = json.loads((current / "manifest.json").read_text())
    del manifest["id"]
    manifest["workload"]["seed"] = seed
    sources: dict[str, Path] = {name: current / name for name in manifest["files"]}
    content: dict[str, bytes] = {}
    if model is not None:
        engine = json.loads(sources["engine.json"].read_text())
        engine["sha256"] = hashlib.sha256(model).hexdigest()
        content = {"engine.json": json.dumps(engine).encode(), engine["file"]: model}
    for name, replaced in content.items():
        del sources[name]
        manifest["files"][name] = {"sha256": hashlib.sha256(replaced).hexdigest(), "bytes": len(replaced)}
    return Release(manifest | {"id": identity(manifest)}, sources, content)


def add(agent: Agent, release: Release, *, age: float = 0.0) -> str:
    """Push a release as if ``age`` seconds ago; return its id."""
    delivery.push(release, agent)
    then = time.time() - age
    os.utime(Path(agent.device.root) / "releases" / release.id / "manifest.json", (then, then))
    return release.id


def switch(release_id: str, agent: Agent) -> dict[str, Any]:
    """Switch without the health check, for releases that have no engine."""
    return releases.switch({"root": agent.device.root, "id": release_id})


def links(root: Path) -> tuple[str | None, str | None]:
    """Return what is current and what is previous; both have to be there."""
    found = [(root / name).resolve(strict=True).name if (root / name).is_symlink() else None
             for name in ("current", "previous")]  # fmt: skip
    return found[0], found[1]


def test_the_list_names_what_is_current_previous_and_damaged(agent: Agent, root: Path, finished_copy: Path) -> None:
    one, _ = links(root)
    two = add(agent, another(root, 2))
    three = add(agent, another(root, 3), age=1e6)
    upkeep.activate(two, agent)
    (root / "releases" / three / "engine.json").unlink()
    printed = run_toolkit(finished_copy, "releases", "tiny")
    assert printed.returncode == 0, printed.stderr
    lines = printed.stdout.splitlines()
    assert [line.split()[0] for line in lines][2] == three, "the oldest comes last"
    marks = {line.split()[0]: line.split()[1] for line in lines}
    assert (marks[two], marks[str(one)]) == ("current", "previous")
    assert lines[2].endswith("DAMAGED: engine.json")
    assert "resnet20 for tiny, onnxruntime int8" in lines[0]
    told = json.loads(run_toolkit(finished_copy, "releases", "tiny", "--json").stdout)
    assert {entry["id"] for entry in told["releases"] if entry["damaged"]} == {three}
    whole = next(entry for entry in told["releases"] if entry["id"] == two)
    files = [path for path in (root / "releases" / two).rglob("*") if path.is_file()]
    assert whole["bytes"] == sum(path.stat().st_size for path in files)
    assert whole["fast"] is False


def test_a_damaged_manifest_is_listed_as_damaged(agent: Agent, root: Path) -> None:
    (root / "current" / "manifest.json").write_text("[")
    (entry,) = upkeep.listed(agent)
    assert (entry.damaged, entry.current, entry.model) == (["manifest.json"], True, None)


def test_rollback_goes_to_the_previous_release_and_back(agent: Agent, root: Path, finished_copy: Path) -> None:
    one, _ = links(root)
    refused = run_toolkit(finished_copy, "rollback", "tiny")
    assert refused.returncode == 1
    assert "there is no previous release" in refused.stderr
    two = add(agent, another(root, 2))
    upkeep.activate(two, agent)
    for expected in ((one, two), (two, one)):
        result = run_toolkit(finished_copy, "rollback", "tiny")
        assert result.returncode == 0, result.stderr
        assert f"release {expected[0]} is current and runs; {expected[1]} is previous" in result.stdout
        assert links(root) == expected


def test_rollback_to_a_release_by_the_beginning_of_its_id(agent: Agent, root: Path, finished_copy: Path) -> None:
    one, _ = links(root)
    two = add(agent, another(root, 2))
    result = run_toolkit(finished_copy, "rollback", "tiny", "--to", two[:7])
    assert result.returncode == 0, result.stderr
    assert links(root) == (two, one)
    assert "is current already" in run_toolkit(finished_copy, "rollback", "tiny", "--to", two).stdout
    unknown = run_toolkit(finished_copy, "rollback", "tiny", "--to", "x" + two[1:])
    assert unknown.returncode == 2
    assert f"did you mean '{two}'?" in unknown.stderr
    ambiguous = run_toolkit(finished_copy, "rollback", "tiny", "--to", "")
    assert ambiguous.returncode == 2
    assert "the beginning of 2 releases" in ambiguous.stderr
    assert two in ambiguous.stderr
    (root / "releases" / str(one) / "engine.json").write_text("{")
    damaged = run_toolkit(finished_copy, "rollback", "tiny")
    assert damaged.returncode == 1
    assert f"release {one} on this machine is damaged: engine.json" in damaged.stderr
    assert links(root) == (two, one)


def test_rollback_to_what_does_not_run_changes_nothing(agent: Agent, root: Path, finished_copy: Path) -> None:
    one, _ = links(root)
    two = add(agent, another(root, 2))
    upkeep.activate(two, agent)
    sick = add(agent, another(root, 3, model=b"no graph at all"))
    result = run_toolkit(finished_copy, "rollback", "tiny", "--to", sick)
    assert result.returncode == 1
    assert f"release {sick} does not run" in result.stderr
    assert "ONNX Runtime does not take model.optimized.onnx" in result.stderr
    assert f"release {two} is current again" in result.stderr
    assert links(root) == (two, one)


def test_a_first_release_that_does_not_run_leaves_none_current(agent: Agent, root: Path, tmp_path: Path) -> None:
    fresh = Agent(LocalDevice(tmp_path / "fresh"))
    sick = add(fresh, another(root, 3, model=b"no graph at all"))
    with pytest.raises(upkeep.UnhealthyError, match="no release is current, as before"):
        upkeep.activate(sick, fresh)
    assert links(tmp_path / "fresh") == (None, None)


def test_no_way_back_is_said(agent: Agent, root: Path) -> None:
    one, _ = links(root)
    sick = add(agent, another(root, 3, model=b"no graph at all"))
    (root / "releases" / str(one) / "engine.json").unlink()
    with pytest.raises(StageError, match=f"and is current nevertheless: .*{one} is damaged: engine.json") as error:
        upkeep.activate(sick, agent)
    assert not isinstance(error.value, upkeep.UnhealthyError)


def test_a_switch_is_not_undone_when_another_has_come_since(agent: Agent, root: Path) -> None:
    two, three = add(agent, another(root, 2)), add(agent, another(root, 3))
    was = switch(two, agent)["was"]
    switch(three, agent)
    assert releases.restore({"root": str(root), "id": two, "was": was}) == {"current": three, "previous": two}


@pytest.mark.parametrize("name", ["engine.json", "model.optimized.onnx"])
def test_the_health_check_names_what_is_damaged(agent: Agent, root: Path, name: str) -> None:
    one, _ = links(root)
    place = {"root": str(root), "id": one}
    assert agent.ask("health", place) == {"id": one}
    (root / "current" / name).write_text("{}")
    with pytest.raises(StageError, match=f"release {one} is damaged: {name}"):
        agent.ask("health", place)


def there(agent: Agent, release: Any, pushed: Pushed) -> Any:
    """What the pipeline's end takes of a delivery."""
    return SimpleNamespace(release=release, device=agent.device, pushed=pushed)


def test_a_committed_release_that_does_not_run_gives_way_to_what_was_current(agent: Agent, root: Path) -> None:
    one, _ = links(root)
    sick = another(root, 3, model=b"no graph at all")
    pushed = delivery.push(sick, agent)
    job: Any = SimpleNamespace(fast=False, allow_fast=False)
    verdict: Any = SimpleNamespace(status="passed")
    commitment = pipeline.commit(job, verdict, there(agent, sick, pushed))
    assert not commitment.committed
    assert not commitment.healthy
    assert f"release {sick.id} does not run" in commitment.reason
    assert (commitment.current, commitment.previous) == links(root) == (one, None)


def test_a_switch_that_died_before_its_last_check_is_checked_by_the_next_run(agent: Agent, root: Path) -> None:
    one, _ = links(root)
    good, sick = another(root, 2), another(root, 3, model=b"no graph at all")
    job: Any = SimpleNamespace(fast=False, allow_fast=False)
    verdict: Any = SimpleNamespace(status="passed")
    for release, expected in ((sick, (one, None)), (good, (good.id, one))):
        delivery.push(release, agent)
        switch(release.id, agent)
        pushed = delivery.push(release, agent)
        assert pushed.unchecked
        commitment = pipeline.commit(job, verdict, there(agent, release, pushed))
        assert commitment.committed == commitment.healthy == (release is good)
        assert (commitment.current, commitment.previous) == links(root) == expected
        assert not delivery.push(release, agent).unchecked


def test_a_broken_contract_stays_where_it_is_when_the_previous_release_does_not_run(
    agent: Agent, root: Path
) -> None:
    one, _ = links(root)
    sick = add(agent, another(root, 3, model=b"no graph at all"))
    switch(sick, agent)
    switch(str(one), agent)
    current: Any = SimpleNamespace(id=one)
    job: Any = SimpleNamespace()
    verdict: Any = SimpleNamespace(status="failed")
    commitment = pipeline.commit(job, verdict, there(agent, current, Pushed(0, one, sick, [])))
    assert "the contract is broken, and there is no way back" in commitment.reason
    assert not commitment.healthy
    assert links(root) == (one, sick)


def test_a_run_whose_release_fails_its_last_check_exits_1(root: Path, finished_copy: Path) -> None:
    """ONNX Runtime breaks on the device after the measurement."""
    (root / "current").unlink()
    (finished_copy / "broken").mkdir()
    (finished_copy / "broken" / "onnxruntime.py").write_text("raise ImportError('it crashed')")
    code = (
        "import os\nfrom toolkit.devices import agent\nask = agent.Agent.ask\n"
        "def sick(self, verb, request, **rest):\n"
        "    if verb == 'activate': os.environ['PYTHONPATH'] = 'broken'\n"
        "    return ask(self, verb, request, **rest)\n"
        "agent.Agent.ask = sick\n"
        "from toolkit.cli import cli\ncli(['run', 'tiny', '--precision', 'int8', '--json'])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=finished_copy, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    run = json.loads(result.stdout)
    jsonschema.validate(run, json.loads(document.SCHEMA.read_text()))
    assert run["verdict"]["passed"]
    assert not run["commit"]["committed"]
    assert "it crashed); no release is current, as before" in run["commit"]["reason"]
    assert links(root) == (None, None)


def small(folder: Path, name: str) -> Release:
    """Return a release without an engine: 1,000 bytes of its own and 10,000 that all of them share."""
    sources, files = {}, {}
    for file, content in (("model.bin", name.encode() * 1000), ("evaluation/images.npy", b"i" * 10_000)):
        sources[file] = folder / name / file
        sources[file].parent.mkdir(parents=True, exist_ok=True)
        sources[file].write_bytes(content)
        files[file] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest: dict[str, Any] = {"files": files}
    return Release(manifest | {"id": identity(manifest)}, sources, {})


@pytest.fixture
def shelf(tmp_path: Path) -> tuple[Agent, list[str]]:
    """A device with five releases, the oldest first; the oldest is current and the second previous."""
    agent = Agent(LocalDevice(tmp_path / "device"))
    ids = [add(agent, small(tmp_path, name), age=1000.0 * (10 - number)) for number, name in enumerate("abcde")]
    switch(ids[1], agent)
    switch(ids[0], agent)
    return agent, ids


def used(root: Path) -> int:
    """Return the bytes below a root, content that is linked twice counted once."""
    return sum({p.stat().st_ino: p.stat().st_size for p in root.rglob("*") if p.is_file()}.values())


def test_prune_keeps_the_newest_the_current_and_the_previous(shelf: tuple[Agent, list[str]]) -> None:
    agent, ids = shelf
    root = Path(agent.device.root)
    before = used(root)
    told = upkeep.prune(agent, 1, dry_run=True)
    assert used(root) == before
    assert upkeep.prune(agent, 1) == told
    assert told.releases == [ids[3], ids[2]]
    assert told.contents == 2, "the evaluation data are shared"
    assert before - used(root) == told.bytes > 2000
    assert {entry.id for entry in upkeep.listed(agent)} == {ids[0], ids[1], ids[4]}
    assert not any(entry.damaged for entry in upkeep.listed(agent))
    assert links(root) == (ids[0], ids[1])
    assert upkeep.prune(agent, 1) == upkeep.Pruned([], 0, [], 0)


def test_prune_removes_what_broken_off_work_left_and_spares_what_is_at_work(
    shelf: tuple[Agent, list[str]],
) -> None:
    agent, ids = shelf
    root = Path(agent.device.root)
    old = time.time() - 2 * 24 * 3600
    for name in ("incoming/old", "incoming/new", "building/old/model.onnx", "measured/old/logits.npy"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100)
        if "old" in name:
            os.utime(path, (old, old))
            os.utime(path.parent, (old, old))
    (root / "building" / "at-work").mkdir()
    (root / "building" / "at-work" / "model.onnx").touch()
    os.utime(root / "building" / "at-work", (old, old))
    shutil.copytree(root / "releases" / ids[4], root / "releases" / "abc.partial")
    told = upkeep.prune(agent, 5)
    assert set(told.leftovers) == {"incoming/old", "building/old", "measured/old", "releases/abc.partial"}
    assert told.releases == []
    assert told.bytes > 300 + 11_000
    assert (root / "incoming" / "new").exists()
    assert (root / "building" / "at-work" / "model.onnx").exists()
    assert not any((root / name).exists() for name in told.leftovers)


def test_a_prune_that_was_killed_is_finished_by_the_next(shelf: tuple[Agent, list[str]]) -> None:
    """However far it came: a release is whole, or it is not there."""
    agent, ids = shelf
    root = Path(agent.device.root)
    halfway = root / "releases" / (ids[2] + ".partial")
    (root / "releases" / ids[2]).rename(halfway)
    (halfway / "model.bin").unlink()
    assert ids[2] not in {entry.id for entry in upkeep.listed(agent)}
    told = upkeep.prune(agent, 5)
    assert told.leftovers == [f"releases/{ids[2]}.partial"]
    assert told.contents == 1
    assert len(list((root / "store").iterdir())) == 5


DIES = """
import json, os, sys
from toolkit.agent import releases, upkeep
verb, request, left = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
def dying(change):
    def step(*arguments, **rest):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        return change(*arguments, **rest)
    return step
for name in ("symlink", "replace", "rename", "unlink", "rmdir"):
    setattr(os, name, dying(getattr(os, name)))
{"switch": releases.switch, "restore": releases.restore, "prune": upkeep.prune}[verb](request)
"""


@pytest.mark.parametrize("verb", ["switch", "restore", "prune"])
def test_whenever_the_agent_dies_current_is_whole_and_the_same_again_completes_it(
    shelf: tuple[Agent, list[str]], verb: str
) -> None:
    """The process ends before its first change to the disk, before its second, and so on."""
    agent, ids = shelf
    root = Path(agent.device.root)
    began = {"current": ids[0], "previous": ids[1]}
    request = {
        "switch": {"id": ids[2]},
        "restore": {"id": ids[2], "was": began},
        "prune": {"keep": 0, "dry_run": False},
    }[verb] | {"root": str(root)}
    if verb == "restore":
        switch(ids[2], agent)
    deaths = 0
    while True:
        command = [sys.executable, "-c", DIES, verb, json.dumps(request), str(deaths)]
        ended = subprocess.run(command, capture_output=True, text=True)
        there = upkeep.listed(agent)
        assert not any(entry.damaged for entry in there)
        whole = {entry.id for entry in there}
        assert set(links(root)) <= whole
        if ended.returncode == 0:
            break
        assert ended.returncode == 9, ended.stderr
        deaths += 1
    assert deaths >= 3
    if verb == "prune":
        assert whole == {ids[0], ids[1]}
        assert len(list((root / "releases").iterdir())) == 2
        assert len(list((root / "store").iterdir())) == 3
    else:
        assert links(root)[0] == (ids[2] if verb == "switch" else ids[0])


def test_no_room_names_what_a_prune_would_free(shelf: tuple[Agent, list[str]], tmp_path: Path) -> None:
    agent, _ = shelf
    large = small(tmp_path, "f")
    large.manifest["files"]["model.bin"]["bytes"] = 10**18
    would = upkeep.prune(agent, 0, dry_run=True).bytes
    with pytest.raises(StageError, match="bytes free and the release needs") as error:
        delivery.push(large, agent)
    assert f"`toolkit releases prune TARGET --keep 0` would free {would:,} bytes" in str(error.value.hint)


def test_pruning_from_the_command_line(agent: Agent, root: Path, finished_copy: Path) -> None:
    one, _ = links(root)
    two = add(agent, another(root, 2), age=1e6)
    result = run_toolkit(finished_copy, "releases", "prune", "tiny", "--keep", "1", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert f"releases/{two}" in result.stdout
    assert "would be freed" in result.stdout
    assert (root / "releases" / two).exists()
    assert f"releases/{two}" in run_toolkit(finished_copy, "releases", "prune", "tiny", "--keep", "1").stdout
    again = run_toolkit(finished_copy, "releases", "prune", "tiny", "--keep", "1")
    assert "nothing to remove" in again.stdout
    assert [path.name for path in (root / "releases").iterdir()] == [one]
    assert run_toolkit(finished_copy, "releases", "prune", "tiny").returncode == 2
    (finished_copy / "targets" / "tiny.yaml").write_text(
        f"{TARGET}root: {finished_copy}/profiles/tiny.yaml/below\n"
    )
    nowhere = run_toolkit(finished_copy, "releases", "tiny")
    assert nowhere.returncode == 1
    assert "error: no permission for" in nowhere.stderr
    assert "no target is called 'tinny'" in run_toolkit(finished_copy, "releases", "tinny").stderr
