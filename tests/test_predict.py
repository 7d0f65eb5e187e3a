"""Using what was delivered: `toolkit predict`, the agent on the device, a program's Model, the example server."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from PIL import Image

from tests.conftest import run_toolkit
from tests.nvidia import graph, images, play, reference, request, write
from tests.sshd import Server, needs_sshd
from tests.test_releases import another
from toolkit.agent import engine, load, model
from toolkit.agent import images as image_files
from toolkit.agent.model import Model
from toolkit.agent.protocol import Refusal
from toolkit.agent.releases import FORMAT, digest, identity
from toolkit.compression import data
from toolkit.delivery import release as delivery
from toolkit.devices.agent import Agent
from toolkit.devices.local import LocalDevice
from toolkit.store import Store
from toolkit.workload import Data

SERVER = Path(__file__).parents[1] / "examples" / "server.py"


@pytest.fixture
def root(finished_copy: Path) -> Path:
    """Where the finished job's device keeps its one release, which is current."""
    return finished_copy / "build" / "devices" / "tiny"


@pytest.fixture
def digits(root: Path, tmp_path: Path) -> list[str]:
    """The first test images, in formats that need Pillow and in such that do not."""
    pixels = np.load(root / "current" / "evaluation" / "images.npy")
    paths = []
    for number, suffix in enumerate(("png", "ppm", "bmp")):
        paths.append(str(tmp_path / f"{number}.{suffix}"))
        Image.fromarray(pixels[number].transpose(1, 2, 0)).save(paths[-1])
    np.save(tmp_path / "3.npy", pixels[3])
    return [*paths, str(tmp_path / "3.npy")]


@pytest.fixture
def no_pillow(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that has no Pillow."""
    (tmp_path / "without" / "PIL").mkdir(parents=True)
    (tmp_path / "without" / "PIL" / "__init__.py").write_text("raise ImportError('no Pillow here')")
    return os.environ | {"PYTHONPATH": str(tmp_path / "without")}


def on_device(root: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the release's own agent, as somebody on the device does."""
    command = [sys.executable, str(root / "current" / "agent.pyz"), "predict", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for something to become so, 30 seconds at most."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not become so")


# --- images --------------------------------------------------------------------------------------------------


def test_the_device_reads_images_as_training_does(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    modes = {"RGB": "jpg", "L": "png", "RGBA": "png", "P": "gif", "CMYK": "tif", "1": "bmp"}
    for split, label in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        folder = tmp_path / "images" / split / label
        folder.mkdir(parents=True)
        for number, (mode, suffix) in enumerate(modes.items()):
            pixels = Image.fromarray(random.integers(0, 256, (20 + number, 33, 3), np.uint8))
            pixels.convert(mode).save(folder / f"{number}.{suffix}")
    artifact = Store(tmp_path / "store").produce(
        "data",
        "k",
        lambda work: data.prepare(work, Data.parse(f"imagefolder:{tmp_path}/images"), 24, tmp_path),
        config={},
        inputs={},
        rerun=True,
    )
    trained_on = {image.tobytes() for split in data.SPLITS for image in data.load(artifact, split).images}
    paths = [path for path in (tmp_path / "images").rglob("*.*") if path.is_file()]
    assert {image_files.read(str(path), 24).tobytes() for path in paths} == trained_on
    assert {image_files.read(path.read_bytes(), 24).tobytes() for path in paths} == trained_on


@pytest.mark.parametrize(("mode", "suffix"), [("RGB", "ppm"), ("L", "pgm")])
def test_without_pillow_the_bytes_are_the_same(
    mode: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(images(1)[0].transpose(1, 2, 0)).convert(mode).save(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n# a comment\n", 1))
    with_pillow = image_files.read(str(path), 8)
    monkeypatch.setitem(sys.modules, "PIL", None)
    np.testing.assert_array_equal(image_files.read(str(path), 8), with_pillow)
    with pytest.raises(image_files.BadImage, match=r"has no Pillow, and without it .*image") as error:
        image_files.read(str(path), 9)
    assert "toolkit provision TARGET" in str(error.value.hint)
    with pytest.raises(image_files.BadImage, match="truncated"):
        image_files.read(path.read_bytes()[:-1], 8)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), np.float32), "the array sent is float32"),
        (np.zeros((8, 8, 3), np.uint8), r"\(8, 8, 3\)"),
        (None, "the image sent is corrupt: cannot identify image file 'sent'"),
    ],
)
def test_what_is_no_image_is_said(array: np.ndarray | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "image.npy"
    path.write_bytes(b"nothing")
    if array is not None:
        np.save(path, array)
    with pytest.raises(ValueError, match=message):
        image_files.read(path.read_bytes(), 8)


# --- predict -------------------------------------------------------------------------------------------------


def test_host_and_device_say_the_same(
    finished: tuple[Path, dict[str, Any]],
    finished_copy: Path,
    root: Path,
    digits: list[str],
    no_pillow: dict[str, str],
) -> None:
    from_host = run_toolkit(finished_copy, "predict", "tiny", *digits, "--top", "2", "--json")
    assert from_host.returncode == 0, from_host.stderr
    told = json.loads(from_host.stdout)
    there = on_device(root, *digits, "--top", "2", "--json")
    assert there.returncode == 0, there.stderr
    assert json.loads(there.stdout) == told
    assert told["release"] == (root / "current").resolve().name
    bench = Store(finished_copy / "build" / "store").lookup("bench", finished[1]["artifacts"]["bench"])
    assert bench
    logits = np.load(bench.file("round-0/logits.npy")).astype(float)
    for number, entry in enumerate(told["images"]):
        scores = np.exp(logits[number]) / np.exp(logits[number]).sum()
        best = np.argsort(-scores, kind="stable")[:2]
        assert entry["image"] == digits[number]
        assert [found["class"] for found in entry["classes"]] == [str(index) for index in best]
        assert [found["score"] for found in entry["classes"]] == pytest.approx(scores[best].tolist(), rel=1e-4)
    printed = run_toolkit(finished_copy, "predict", "tiny", *digits)
    assert printed.stdout == on_device(root, *digits).stdout
    first = told["images"][0]["classes"][0]
    assert printed.stdout.splitlines()[0].startswith(f"{digits[0]}: {first['class']} {first['score']:.4f}, ")
    assert not list((root / "measured").iterdir()), "the images are gone again"

    bare = on_device(root, digits[1], digits[3], "--top", "2", "--json", env=no_pillow)
    assert [entry["classes"] for entry in json.loads(bare.stdout)["images"]] == [
        told["images"][number]["classes"] for number in (1, 3)
    ]
    refused = on_device(root, digits[0], env=no_pillow)
    assert refused.returncode == 2
    assert "hint: `toolkit provision TARGET` brings Pillow" in refused.stderr


def test_a_bad_image_is_named_and_nothing_is_sent(finished_copy: Path, root: Path, digits: list[str]) -> None:
    bad = Path(digits[1])
    bad.write_bytes(b"nothing")
    for result in (run_toolkit(finished_copy, "predict", "tiny", *digits), on_device(root, *digits)):
        assert result.returncode == 2
        assert f"the image {bad} is corrupt" in result.stderr
        assert result.stdout == ""
    bad.unlink()
    for result in (run_toolkit(finished_copy, "predict", "tiny", *digits), on_device(root, *digits)):
        assert result.returncode == 2
        assert bad.name in result.stderr
    assert not list((root / "measured").iterdir())


def test_without_a_release_it_says_how_to_bring_one(finished_copy: Path, root: Path, digits: list[str]) -> None:
    agent = Agent(LocalDevice(root))
    (root / "current").unlink()
    result = run_toolkit(finished_copy, "predict", "tiny", *digits)
    assert result.returncode == 1
    assert "no release is current on this machine" in result.stderr
    assert "toolkit run tiny" in result.stderr
    with pytest.raises(Refusal, match="there is no release at"):
        load(str(root / "current"))
    alone = subprocess.run([sys.executable, agent.place, "predict", digits[0]], capture_output=True, text=True)
    assert alone.returncode == 1
    assert "this agent is part of no release" in alone.stderr


def test_a_damaged_release_answers_nothing(finished_copy: Path, root: Path, digits: list[str]) -> None:
    (root / "current" / "engine.json").write_text("{}")
    for result in (run_toolkit(finished_copy, "predict", "tiny", *digits), on_device(root, *digits)):
        assert result.returncode == 1
        assert "is damaged: engine.json" in result.stderr


# --- a program's model ---------------------------------------------------------------------------------------


def put_together(root: Path, folder: Path, *, classes: list[str], shape: list[int], **changes: Any) -> str:
    """Make a release of an engine's folder, make it current, and return its id."""
    files = {path.name: path for path in folder.iterdir() if path.name in ("engine.json", "model.engine")}
    files |= {path.name: path for path in folder.glob("*.optimized.onnx")}
    manifest = {
        "format": FORMAT,
        "files": {name: {"sha256": digest(str(path))} for name, path in files.items()},
        "model": {"classes": classes, "input": ["uint8", *shape]},
        "engine": {"runtime": json.loads(files["engine.json"].read_text())["runtime"]},
        **changes,
    }
    release = identity(manifest)
    there = root / "releases" / release
    there.mkdir(parents=True)
    for name, path in files.items():
        (there / name).write_bytes(path.read_bytes())
    (there / "manifest.json").write_text(json.dumps(manifest | {"id": release}))
    point(root, release)
    return release


def point(root: Path, release: str) -> None:
    (root / ".current.new").symlink_to(f"releases/{release}")
    (root / ".current.new").replace(root / "current")


@contextlib.contextmanager
def loaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.setattr(model, "_LOOK_SECONDS", 0.02)
    with contextlib.closing(load(str(root / "current"))) as opened:
        yield opened


def test_the_three_lines_of_a_program(root: Path, tmp_path: Path) -> None:
    program = (
        "import json, sys\nimport numpy as np\nROOT = sys.argv[1]\n"
        'sys.path.insert(0, ROOT + "/current/agent.pyz")\n'
        "from toolkit_agent import load\n"
        'model = load(ROOT + "/current")\n'
        'images = np.load(ROOT + "/current/evaluation/images.npy")[:70]\n'
        "logits = model(images)\n"
        "print(json.dumps([model.classes, model.release, model.input_shape, str(logits.dtype), logits.shape]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(root)], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert result.returncode == 0, result.stderr
    names = [str(number) for number in range(10)]
    current = (root / "current").resolve().name
    assert json.loads(result.stdout) == [names, current, [3, 16, 16], "float32", [70, 10]]


def test_a_reload_needs_nothing_of_the_archive_that_the_program_began_with(root: Path, tmp_path: Path) -> None:
    archive = tmp_path / "agent.pyz"
    archive.write_bytes((root / "current" / "agent.pyz").read_bytes())
    second = another(root, 2)
    delivery.push(second, Agent(LocalDevice(root)))
    program = (
        "import os, sys, time\nroot, archive, second = sys.argv[1:]\nsys.path.insert(0, archive)\n"
        "from toolkit_agent import load, model\nmodel._LOOK_SECONDS = 0.02\n"
        'opened = load(root + "/current")\n'
        'open(archive, "wb").write(b"another release")\n'
        'os.symlink("releases/" + second, root + "/.new")\nos.replace(root + "/.new", root + "/current")\n'
        "while opened.release != second: time.sleep(0.02)\n"
        "opened.close()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(root), str(archive), second.id],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("library", ["cuda_python", "pycuda"])
def test_a_gpus_engine_in_several_threads(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a reload; PyCUDA wants its context in every thread, and a plan takes 8 images at most."""
    play(monkeypatch, library=library)
    import standin_gpu

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        engine.build(request(tmp_path / name, graph(tmp_path / "model.onnx")))
    classes = [str(number) for number in range(10)]
    first = put_together(tmp_path, tmp_path / "one", classes=classes, shape=[3, 8, 8])
    batches = [images(count) for count in (1, 20, 8)]
    expected = [reference(tmp_path / "model.onnx", batch) for batch in batches]
    problems: list[str] = []
    done = threading.Event()
    with loaded(tmp_path, monkeypatch) as opened:
        held = len(standin_gpu._memory)

        def ask(turn: int) -> None:
            try:
                while not done.is_set():
                    np.testing.assert_array_equal(opened(batches[turn]), expected[turn])
            except BaseException as problem:
                problems.append(repr(problem))

        threads = [threading.Thread(target=ask, args=(turn,)) for turn in range(3)]
        for thread in threads:
            thread.start()
        assert opened.release == first
        second = put_together(tmp_path, tmp_path / "two", classes=classes, shape=[3, 8, 8], seed=2)
        eventually(lambda: opened.release == second)
        done.set()
        for thread in threads:
            thread.join()
        assert problems == []
        eventually(lambda: len(standin_gpu._memory) == held)  # the first engine has given its memory back
    eventually(lambda: not standin_gpu._memory)


def test_wrong_images_are_said(root: Path) -> None:
    with contextlib.closing(Model(str(root / "current"), reload=False)) as opened:
        for wrong in (
            np.zeros((1, 3, 8, 8), np.uint8),
            np.zeros((1, 3, 16, 16)),
            np.zeros((0, 3, 16, 16), np.uint8),
        ):
            with pytest.raises(ValueError, match=r"takes uint8 images \(N, 3, 16, 16\), not"):
                opened(wrong)


def test_what_does_not_run_is_not_taken_up(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    agent = Agent(LocalDevice(root))
    good = (root / "current").resolve().name
    pixels = np.load(root / "current" / "evaluation" / "images.npy")[:5]
    broken = another(root, 2, b"no model")
    newer = another(root, 3)
    newer.manifest["format"] = FORMAT + 1
    newer.manifest["id"] = identity(newer.manifest)
    better = another(root, 4)
    for release in (broken, newer, better):
        delivery.push(release, agent)
    with loaded(root, monkeypatch) as opened, caplog.at_level(logging.WARNING, "toolkit.agent.model"):
        expected = opened(pixels)
        for release, reason in ((broken, "does not take"), (newer, f"is of format {FORMAT + 1}")):
            caplog.clear()
            point(root, release.id)
            eventually(lambda: bool(caplog.records))
            time.sleep(0.2)
            (told,) = caplog.messages
            assert release.id in told
            assert reason in told
            assert told.endswith(f"release {good} goes on")
            np.testing.assert_array_equal(opened(pixels), expected)
        (root / "current").unlink()
        point(root, better.id)
        eventually(lambda: opened.release == better.id)
        np.testing.assert_array_equal(opened(pixels), expected)


def test_a_release_may_take_other_images_and_name_other_classes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnx").mkdir()
    names = [f"class {number}" for number in range(10)]
    path = graph(tmp_path / "model.onnx")
    engine.build(request(tmp_path / "onnx", path, runtime="onnxruntime") | {"threads": 1})
    picture = tmp_path / "picture.png"
    Image.fromarray(images(1)[0].transpose(1, 2, 0)).save(picture)
    with loaded(root, monkeypatch) as opened:
        assert opened.predict([str(picture)]).classes == [str(number) for number in range(10)]
        release = put_together(root, tmp_path / "onnx", classes=names, shape=[3, 8, 8])
        eventually(lambda: opened.release == release)
        assert opened.input_shape == (3, 8, 8)
        answer = opened.predict([picture.read_bytes()])
        np.testing.assert_allclose(answer.logits, reference(path, images(1)), rtol=1e-5)
        assert answer.top(1)[0][0][0] == names[int(answer.logits.argmax())]


def test_what_is_no_classifier_runs_and_is_not_predicted(finished_copy: Path, root: Path, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["logits"], axes=[3], keepdims=0),
    ]
    path = write(
        tmp_path / "model.onnx",
        nodes,
        [],
        shape=["batch", 3, 8, 8],
        output=(TensorProto.FLOAT, ["batch", 3, 8]),
    )
    (tmp_path / "onnx").mkdir()
    engine.build(request(tmp_path / "onnx", path, runtime="onnxruntime") | {"threads": 1})
    release = put_together(root, tmp_path / "onnx", classes=[], shape=[3, 8, 8])
    with contextlib.closing(Model(str(root / "current"), reload=False)) as opened:
        np.testing.assert_allclose(opened(images(2)), images(2).mean(3), rtol=1e-5)
    np.save(tmp_path / "image.npy", images(1)[0])
    picture = str(tmp_path / "image.npy")
    agent = [sys.executable, Agent(LocalDevice(root)).place]
    (root / "current" / "agent.pyz").write_bytes(Path(agent[1]).read_bytes())
    for result in (run_toolkit(finished_copy, "predict", "tiny", picture), on_device(root, picture)):
        assert result.returncode == 1
        assert f"release {release} is no classifier: it computes 3 x 8 values an image" in result.stderr
        assert "docs/applications.md" in result.stderr


# --- the example, on a device --------------------------------------------------------------------------------


@needs_sshd
def test_the_example_serves_through_every_switch(
    finished_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody who asks notices that `toolkit run` and `toolkit rollback` switch the release under the server."""
    sshd = Server(tmp_path / "ssh")
    monkeypatch.setenv("TOOLKIT_SSH_CONFIG", str(sshd.config))
    target = finished_copy / "targets" / "tiny.yaml"
    target.write_text(f"{target.read_text()}host: orin\npython: {sys.executable}\n")
    sshd.start()
    serving: subprocess.Popen[str] | None = None
    try:
        device = sshd.home("orin")
        shutil.copytree(finished_copy / "build" / "devices" / "tiny", device / ".toolkit", symlinks=True)
        releases = [(device / ".toolkit" / "current").resolve().name]
        (device / "server.py").write_bytes(SERVER.read_bytes())
        serving = subprocess.Popen(
            ["ssh", "-tt", "-F", str(sshd.config), "orin", f"{sys.executable} server.py ~/.toolkit --port 0"],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        assert serving.stdout
        port = int(serving.stdout.readline().rpartition(":")[2])
        image = (device / ".toolkit" / "current" / "evaluation" / "images.npy").resolve()
        np.save(tmp_path / "image.npy", np.load(image)[0])
        with clients(port, (tmp_path / "image.npy").read_bytes()) as answers:
            releases.append(run_and_commit(finished_copy, "fp32"))
            assert len(set(releases)) == 2
            eventually(lambda: answers[-1][1] == releases[1])
            for expected in (releases[0], releases[1], releases[0]):
                result = run_toolkit(finished_copy, "rollback", "tiny")
                assert result.returncode == 0, result.stderr
                eventually(lambda wanted=expected: answers[-1][1] == wanted)
        assert {status for status, _ in answers} == {200}
        assert {release for _, release in answers} == set(releases)
        predicted = run_toolkit(finished_copy, "predict", "tiny", str(tmp_path / "image.npy"), "--json")
        asked = post(port, (tmp_path / "image.npy").read_bytes())
        assert asked[1]["classes"] == json.loads(predicted.stdout)["images"][0]["classes"]
        assert post(port, b"no image")[0] == 400
        assert "cannot identify image file" in post(port, b"no image")[1]["error"]
    finally:
        if serving is not None:
            serving.kill()
            serving.wait()
        sshd.stop()


def run_and_commit(folder: Path, precision: str) -> str:
    result = run_toolkit(folder, "run", "tiny", "--precision", precision, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["commit"]["committed"]
    return str(document["commit"]["release"])


def post(port: int, content: bytes) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", "/", content)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


@contextlib.contextmanager
def clients(port: int, content: bytes) -> Iterator[list[tuple[int, str]]]:
    """Ask from four threads all the time; the list grows by the status and the release of every answer."""
    answers: list[tuple[int, str]] = []
    done = threading.Event()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            while not done.is_set():
                connection.request("POST", "/", content)
                response = connection.getresponse()
                document = json.loads(response.read())
                answers.append((response.status, document.get("release", "")))
                time.sleep(0.05)
        except (OSError, http.client.HTTPException) as problem:
            answers.append((0, repr(problem)))
        connection.close()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: bool(answers))
    try:
        yield answers
    finally:
        done.set()
        for thread in threads:
            thread.join()
