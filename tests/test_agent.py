"""The agent as the zipapp that it travels as, run by a Python of its own."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit import agent as agent_package
from toolkit.agent import releases
from toolkit.agent.protocol import Refusal
from toolkit.agent.releases import identity
from toolkit.bench.agreement import PROBED, require_alike
from toolkit.delivery import release as delivery
from toolkit.delivery.release import Release
from toolkit.devices.agent import PACKAGE, Agent, pack
from toolkit.devices.local import LocalDevice
from toolkit.errors import StageError
from toolkit.store import Store


def test_it_imports_nothing_but_the_standard_library_numpy_and_the_runtime() -> None:
    allowed = set(sys.stdlib_module_names) | {"numpy", "onnxruntime", "openvino", "cuda", "pycuda", "PIL"}
    for path in Path(agent_package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 8))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in allowed, path


def test_every_module_is_imported_by_the_oldest_python(tmp_path: Path) -> None:
    oldest = shutil.which("python3.8")
    if oldest is None or subprocess.run([oldest, "--version"], capture_output=True).returncode:
        pytest.skip("there is no Python 3.8 here")
    (tmp_path / "agent.pyz").write_bytes(pack())
    (tmp_path / "numpy.py").touch()  # annotations name it, and nothing of it is used on import
    names = sorted(path.stem for path in Path(agent_package.__file__).parent.glob("[!_]*.py"))
    program = f"import sys; sys.path[:0] = ['agent.pyz', '.']; from {PACKAGE} import {', '.join(names)}"
    result = subprocess.run([oldest, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_equal_sources_pack_to_equal_bytes() -> None:
    assert pack() == pack()


@pytest.fixture
def device(tmp_path: Path) -> LocalDevice:
    return LocalDevice(tmp_path / "device")


def release(name: str, folder: Path) -> Release:
    sources, files = {}, {}
    for file, content in (("model.bin", f"model {name}".encode()), ("evaluation/images.npy", b"images" * 1000)):
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        sources[file] = path
        import hashlib

        files[file] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest: dict[str, Any] = {"files": files}
    return Release(manifest | {"id": identity(manifest)}, sources, {})


def switch(device: LocalDevice, release: Release) -> dict[str, Any]:
    """Switch without the health check: these releases have no engine."""
    return releases.switch({"root": device.root, "id": release.id})


def test_push_sends_only_what_is_missing(device: LocalDevice, tmp_path: Path) -> None:
    agent = Agent(device)
    one, two = release("one", tmp_path), release("two", tmp_path)
    assert delivery.push(one, agent).sent_bytes == 6009
    assert delivery.push(one, agent).sent_bytes == 0
    assert delivery.push(two, agent).sent_bytes == 9, "the evaluation data are there already"
    images = [Path(device.root) / "releases" / r.id / "evaluation" / "images.npy" for r in (one, two)]
    assert images[0].stat().st_ino == images[1].stat().st_ino


@pytest.mark.parametrize(("left", "sent"), [(b"ima", 5997), (b"x" * 10, 6000), (b"images" * 1001, 6000)])
def test_what_a_broken_push_left_is_gone_on_from(
    device: LocalDevice, tmp_path: Path, left: bytes, sent: int
) -> None:
    one = release("one", tmp_path)
    begun = Path(device.root, "incoming", one.manifest["files"]["evaluation/images.npy"]["sha256"])
    begun.parent.mkdir(parents=True)
    begun.write_bytes(left)
    assert delivery.push(one, Agent(device)).sent_bytes == sent + len(b"model one")
    images = Path(device.root, "releases", one.id, "evaluation", "images.npy")
    assert images.read_bytes() == b"images" * 1000


def test_switch_keeps_the_previous_release(device: LocalDevice, tmp_path: Path) -> None:
    agent = Agent(device)
    one, two = release("one", tmp_path), release("two", tmp_path)
    for item in (one, two):
        delivery.push(item, agent)
        switch(device, item)
    root = Path(device.root)
    assert (root / "current").resolve() == root / "releases" / two.id
    assert (root / "previous").resolve() == root / "releases" / one.id
    assert (root / "current" / "model.bin").read_text() == "model two"
    assert switch(device, two)["previous"] == one.id, "switching to what is current changes nothing"


@pytest.mark.parametrize("name", ["model.bin", "manifest.json"])
def test_a_damaged_release_is_named_and_mended(device: LocalDevice, tmp_path: Path, name: str) -> None:
    agent = Agent(device)
    one = release("one", tmp_path)
    delivery.push(one, agent)
    path = Path(device.root) / "releases" / one.id / name
    path.write_bytes(b"{}")
    with pytest.raises(Refusal, match=f"is damaged: {name}"):
        switch(device, one)
    assert not (Path(device.root) / "current").exists()
    assert delivery.push(one, agent).repaired == [name]
    left = {str(file.relative_to(path.parent)) for file in path.parent.rglob("*") if file.is_file()}
    assert left == {"model.bin", "manifest.json", "evaluation/images.npy"}
    switch(device, one)
    assert delivery.push(one, agent).repaired == []


def test_what_arrives_damaged_is_refused(device: LocalDevice, tmp_path: Path) -> None:
    one = release("one", tmp_path)
    one.sources["model.bin"].write_bytes(b"something else")
    with pytest.raises(StageError, match=r"model\.bin arrived damaged"):
        delivery.push(one, Agent(device))
    assert not list((Path(device.root) / "releases").iterdir())


def test_no_room_is_said_before_anything_is_sent(
    device: LocalDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = release("one", tmp_path)
    one.manifest["files"]["model.bin"]["bytes"] = 10**18
    with pytest.raises(StageError, match="bytes free and the release needs"):
        delivery.push(one, Agent(device))
    assert not list((Path(device.root) / "incoming").iterdir())


def test_another_protocol_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.pyz"
    path.write_bytes(pack())
    request = json.dumps({"protocol": 99, "root": str(tmp_path)})
    result = subprocess.run([sys.executable, path, "facts"], input=request, capture_output=True, text=True)
    assert result.returncode == 1
    assert "speaks protocol 99" in json.loads(result.stdout)["message"]


def test_facts(device: LocalDevice) -> None:
    facts = Agent(device).ask("facts", {"root": device.root})
    assert facts == device.facts() | {"free_bytes": facts["free_bytes"], "memory_bytes": facts["memory_bytes"]}
    assert "onnxruntime" in facts["runtimes"]
    assert facts["gpus"] == []
    assert facts["l4t"] is None
    assert facts["memory_bytes"] > 1e8


def test_an_engine_of_another_machine_is_refused(finished_copy: Path) -> None:
    root = finished_copy / "build" / "devices" / "tiny"
    folder = (root / "current").resolve()
    engine = json.loads((folder / "engine.json").read_text())
    engine["fingerprint"]["cpu"] = "another"
    (folder / "engine.json").write_text(json.dumps(engine))
    request = {"root": str(root), "release": str(folder), "out": str(root / "out")}
    with pytest.raises(StageError, match="the engine does not fit: built for another, the device has") as error:
        Agent(LocalDevice(root)).ask("bench", request)
    assert "rebuild it" in str(error.value.hint)


def test_a_truncated_engine_is_refused(finished_copy: Path) -> None:
    root = finished_copy / "build" / "devices" / "tiny"
    folder = (root / "current").resolve()
    model = folder / "model.optimized.onnx"
    model.write_bytes(model.read_bytes()[:1000])
    request = {"root": str(root), "release": str(folder), "out": str(root / "out")}
    with pytest.raises(StageError, match=r"the engine model\.optimized\.onnx is damaged"):
        Agent(LocalDevice(root)).ask("bench", request)


def test_the_raw_measurement_supports_what_is_reported(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, document = finished
    bench = document["bench"]
    store = Store(folder / "build" / "store")
    artifact = store.lookup("bench", document["artifacts"]["bench"])
    data = store.lookup("data", document["artifacts"]["data"])
    assert artifact
    assert data
    latencies = np.concatenate(
        [
            np.load(artifact.file(entry["file"]))
            for measured in bench["rounds"]
            for entry in measured["scenarios"]
            if entry["name"] == "SingleStream"
        ]
    )
    assert len(latencies) == bench["samples"] >= 400
    assert np.percentile(latencies, 50) / 1e6 == pytest.approx(bench["latency_ms"]["p50"]["value"], rel=1e-3)
    logits = np.load(artifact.file("round-0/logits.npy"))
    labels = np.load(data.file("test.labels.npy"))
    assert (logits.argmax(1) == labels).mean() == pytest.approx(bench["accuracy"])
    assert bench["images"] == len(labels) == 359
    assert 10e6 < bench["peak_memory_bytes"] < 400e6


def test_the_probe_computes_what_the_graph_says(finished_copy: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    root = finished_copy / "build" / "devices" / "tiny"
    artifacts = finished[1]["artifacts"]
    store = Store(finished_copy / "build" / "store")
    reference = store.lookup("reference", artifacts["reference"])
    assert reference
    here = json.loads((root / "current" / "manifest.json").read_text())
    logits = delivery.probe(Release(here, {}, {}), Agent(LocalDevice(root)), PROBED)
    assert logits is not None
    assert logits.shape == (PROBED, 10)
    require_alike(reference, logits, "int8", "orin")
    logits[3] = -logits[3]
    with pytest.raises(StageError, match="the engine on orin computes something else than its graph"):
        require_alike(reference, logits, "int8", "orin")
    logits[3] = np.nan
    with pytest.raises(StageError, match="computes something else"):
        require_alike(reference, logits, "int8", "orin")
