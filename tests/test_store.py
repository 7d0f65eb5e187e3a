from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from toolkit import garbage
from toolkit.errors import StageError, UsageError
from toolkit.store import Artifact, DamagedError, Store, Work


def write(work: Work) -> dict[str, Any]:
    (work.out / "sub").mkdir()
    (work.out / "sub" / "a.bin").write_bytes(b"abc" * 100)
    (work.out / "b.txt").write_text("b")
    return {"answer": 42}


def produce(store: Store, key: str = "k", **options: Any) -> Artifact:
    return store.produce("stage", key, options.pop("make", write), config={}, inputs={}, **options)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_made_once_then_reused(store: Store) -> None:
    first, second = produce(store), produce(store)
    assert (first.cached, second.cached) == (False, True)
    assert first.digest == second.digest
    assert second.meta == {"answer": 42}
    assert second.file("b.txt").read_text() == "b"
    assert not list((store.root / ".partial").iterdir())


def test_the_key_depends_on_everything_that_goes_in(store: Store) -> None:
    artifact = produce(store)
    other = produce(store, "other", make=lambda work: {"answer": 43})
    keys = {
        Store.key("s", 1, {"a": 1}, {"x": artifact}),
        Store.key("s", 2, {"a": 1}, {"x": artifact}),
        Store.key("t", 1, {"a": 1}, {"x": artifact}),
        Store.key("s", 1, {"a": 2}, {"x": artifact}),
        Store.key("s", 1, {"a": 1}, {"x": other}),
    }
    assert len(keys) == 5


def test_a_failure_leaves_nothing_behind_that_could_be_taken_for_a_result(store: Store) -> None:
    def fail(work: Work) -> dict[str, Any]:
        (work.out / "half").write_text("half")
        (work.resume / "checkpoint").write_text("kept")
        raise StageError("no")

    with pytest.raises(StageError):
        produce(store, make=fail)
    assert store.lookup("stage", "k") is None

    def succeed(work: Work) -> dict[str, Any]:
        assert (work.resume / "checkpoint").read_text() == "kept"
        assert not list(work.out.iterdir())
        return {}

    produce(store, make=succeed)
    assert not list((store.root / ".resume").iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["sub/a.bin", "artifact.json"])
@pytest.mark.parametrize("damage", [truncate, alter, Path.unlink])
def test_damage_is_noticed_named_and_mended(store: Store, name: str, damage: Any) -> None:
    artifact = produce(store)
    damage(artifact.path / name)
    with pytest.raises(DamagedError, match=name):
        store.lookup("stage", "k")
    told: list[str] = []
    again = produce(store, warn=told.append)
    assert not again.cached
    assert again.digest == artifact.digest
    assert name in told[0]


def test_altered_meta_is_noticed(store: Store) -> None:
    artifact = produce(store)
    record = json.loads(artifact.file("artifact.json").read_text())
    record["meta"]["answer"] = 41
    artifact.file("artifact.json").write_text(json.dumps(record))
    with pytest.raises(DamagedError, match="seal"):
        store.lookup("stage", "k")


def test_an_artifact_of_another_store_is_taken_over_whole(store: Store, tmp_path: Path) -> None:
    made = produce(Store(tmp_path / "elsewhere"))

    def fill(out: Path) -> None:
        shutil.copytree(made.path, out, dirs_exist_ok=True)

    store.receive("stage", "k", fill)
    found = produce(store, make=lambda work: pytest.fail("made again"))
    assert (found.cached, found.digest) == (True, made.digest)
    store.receive("stage", "k", lambda out: pytest.fail("fetched again"))
    (made.path / "b.txt").write_text("c")
    with pytest.raises(DamagedError, match=r"b\.txt was altered"):
        store.receive("stage", "other", fill)


def test_rerun_replaces(store: Store) -> None:
    produce(store)
    again = produce(store, make=lambda work: {"answer": 1}, rerun=True)
    found = store.lookup("stage", "k")
    assert not again.cached
    assert found is not None
    assert found.meta == {"answer": 1}


def test_a_rerun_makes_it_anew_once_for_all_who_share_the_store(store: Store) -> None:
    made = []

    def make(work: Work) -> dict[str, Any]:
        made.append(1)
        return {}

    for rerun in (False, True, True):
        store.produce("stage", "k", make, config={}, inputs={}, rerun=rerun)
    assert len(made) == 2


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"format": 99}')
    with pytest.raises(UsageError, match="format 99"):
        Store(tmp_path)


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from toolkit.store import Store
waits = Path({str(tmp_path / "waits")!r})
def make(work):
    while not waits.exists(): time.sleep(0.01)
    (work.out / "f").write_text("x"); return {{}}
def warn(text):
    print(text); waits.touch()
a = Store(Path({str(tmp_path)!r})).produce("s", "k", make, config={{}}, inputs={{}}, warn=warn)
print(a.cached)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert sorted("False" in text for text in printed) == [False, True]
    assert any("another process is at work" in text for text in printed)


def test_a_killed_writer_leaves_the_lock_free(store: Store) -> None:
    code = f"""
import time
from pathlib import Path
from toolkit.store import Store
def make(work):
    (work.out / "half").write_text("x"); print("in", flush=True); time.sleep(60)
Store(Path({str(store.root)!r})).produce("stage", "k", make, config={{}}, inputs={{}})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "in\n"
    process.kill()
    process.wait()
    started = time.monotonic()
    artifact = produce(store)
    assert time.monotonic() - started < 5
    assert set(artifact.files) == {"sub/a.bin", "b.txt"}


def test_garbage_keeps_what_is_referred_to(store: Store) -> None:
    produce(store, "kept")
    produce(store, "gone")
    listed = garbage.of_store(store, {("stage", "kept")}, time.time(), remove=False)
    assert [path.name for path, _ in listed] == ["gone"]
    assert store.lookup("stage", "gone")
    garbage.of_store(store, {("stage", "kept")}, time.time(), remove=True)
    assert store.lookup("stage", "gone") is None
    assert store.lookup("stage", "kept")


def test_garbage_is_not_collected_under_a_run(store: Store) -> None:
    with store.in_use(), pytest.raises(StageError, match="a run is using"):
        garbage.of_store(store, set(), time.time(), remove=True)


def test_garbage_is_nothing_that_an_interrupted_run_goes_on_with(tmp_path: Path) -> None:
    build = tmp_path / "build"
    store = Store(build / "store")
    produce(store, "old")
    time.sleep(0.02)
    (build / "runs" / "20260101T000000-a").mkdir(parents=True)
    time.sleep(0.02)
    produce(store, "new")

    def broken(work: Work) -> dict[str, Any]:
        (work.resume / "checkpoint.pt").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.produce("stage", "broken", broken, config={}, inputs={})
    removed = garbage.collect(build, 5, remove=True)
    assert [path.name for path, _ in removed] == ["old", "stage-broken"]
    assert store.lookup("stage", "new")
    assert (store.root / ".resume" / "stage-broken" / "checkpoint.pt").exists()
    made = store.produce("stage", "broken", lambda work: {}, config={}, inputs={}, amount=100)
    assert json.loads((made.path / "artifact.json").read_text())["amount"] is None, "its time is not all of it"


def mount(folder: Path, options: str) -> bool:
    folder.mkdir(exist_ok=True)
    return (
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode
        == 0
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    if not mount(small, "size=1m"):
        pytest.skip("no file system can be mounted here")
    try:
        store = Store(small / "store")
        produce(store, "kept")

        def big(work: Work) -> dict[str, Any]:
            (work.out / "big").write_bytes(bytes(4_000_000))
            return {}

        with pytest.raises(StageError, match="disk is full"):
            produce(store, "big", make=big)
        assert store.lookup("stage", "kept")
        assert store.lookup("stage", "big") is None
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a read-only file system needs root")
def test_no_permission_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    if not mount(folder, "size=1m,ro"):
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(StageError, match="no permission"):
            produce(Store(folder / "store"))
    finally:
        subprocess.run(["umount", folder], check=True)
