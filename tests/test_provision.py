"""A device gets the runtime: over a real sshd, by real pip, into real virtual environments."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import TARGET, run_toolkit
from tests.sshd import Server, needs_sshd
from tests.test_doctor import COMMON, ORIN, T4, parse
from toolkit import files
from toolkit.agent import PROTOCOL, facts
from toolkit.delivery import provision, wheels
from toolkit.devices.agent import Agent
from toolkit.devices.local import LocalDevice
from toolkit.errors import StageError, UsageError

ORDINARY = {"numpy": "numpy", "onnxruntime": "onnxruntime", "pillow": "PIL"}


def make_wheel(
    folder: Path, name: str, module: str, body: str = "", requires: str = "", version: str = "1.0", ballast: int = 0
) -> Path:
    """Write a wheel of one module, as PEP 427 describes it."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    described = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    contents = {
        f"{module}.py": body.encode(),
        f"{module}.bin": os.urandom(ballast),
        f"{name}-{version}.dist-info/METADATA": (
            described + f"Requires-Dist: {requires}\n" * bool(requires)
        ).encode(),
        f"{name}-{version}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{name}-{version}.dist-info/RECORD"
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in contents.items():
            archive.writestr(part, content)
        archive.writestr(record, "".join(f"{part},,\n" for part in [*contents, record]))
    return path


@pytest.fixture(scope="session")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pip as a wheel."""
    folder = tmp_path_factory.mktemp("pip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "pip"]
    subprocess.run(command, check=True)
    return next(folder.glob("pip-*.whl"))


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python as a fresh device has it: without NumPy, without pip."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return str(folder / "bin" / "python")


@pytest.fixture
def shelf(tmp_path: Path, pip: Path) -> Path:
    """A folder of small wheels with the names of the large ones."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    (folder / pip.name).symlink_to(pip)
    for name, module in ORDINARY.items():
        make_wheel(folder, name, module)
    return folder


# --- what the agent does -------------------------------------------------------------------------------------


class Bench:
    """A device's root, with the agent on a bare Python, and small wheels to make environments of."""

    def __init__(self, folder: Path, python: str, pip: Path) -> None:
        self.root = folder / "root"
        self.source = folder / "source"
        self.source.mkdir()
        self.python = python
        self.pip = pip
        self.agent = Agent(LocalDevice(self.root), python)

    def order(self, *made: Path, modules: list[str], system: bool = False) -> dict[str, Any]:
        """Put wheels on the device and return the request for an environment of them."""
        (self.root / "wheels").mkdir(parents=True, exist_ok=True)
        hashes = {}
        for path in (self.pip, *made):
            (self.root / "wheels" / path.name).write_bytes(path.read_bytes())
            hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return {
            "root": str(self.root), "wheels": hashes, "requirements": {}, "modules": modules, "system": system,
        }  # fmt: skip

    def old(self) -> None:
        """Make an environment that has to go on working."""
        self.agent.ask("provision", self.order(make_wheel(self.source, "old", "old"), modules=["old"]))

    def imports(self, module: str) -> bool:
        """Tell whether the environment in use has a module."""
        command = [self.root / "environment" / "bin" / "python", "-c", f"import {module}"]
        return subprocess.run(command, capture_output=True).returncode == 0

    def environments(self) -> list[str]:
        return [path.name for path in (self.root / "environments").iterdir()]


@pytest.fixture
def bench(tmp_path: Path, bare: str, pip: Path) -> Bench:
    return Bench(tmp_path, bare, pip)


def test_an_environment_is_made_once(bench: Bench) -> None:
    bench.old()
    order = bench.order(make_wheel(bench.source, "new", "new", requires="new-part"), modules=["new"])
    with pytest.raises(StageError, match="No matching distribution found for new-part"):
        bench.agent.ask("provision", order)
    assert bench.imports("old")
    part = make_wheel(bench.source, "new_part", "part")
    order = bench.order(bench.source / "new-1.0-py3-none-any.whl", part, modules=["new", "part"])
    assert bench.agent.ask("provision", order)["changed"]
    assert bench.imports("new")
    assert not bench.imports("old")
    assert len(bench.environments()) == 1, "the old environment was left"
    assert {path.name for path in (bench.root / "wheels").iterdir()} == set(order["wheels"])
    made = bench.environments()
    assert not bench.agent.ask("provision", order)["changed"]
    assert bench.environments() == made


@pytest.mark.parametrize("point", ["making", "installing", "importing"])
def test_killed_anywhere_the_old_environment_stays(bench: Bench, point: str) -> None:
    bench.old()
    mark = bench.root / "importing"
    slow = f"import pathlib, time\nif not pathlib.Path({str(mark)!r}).exists():\n    "
    slow += f"pathlib.Path({str(mark)!r}).touch()\n    time.sleep(300)\n"
    order = bench.order(make_wheel(bench.source, "new", "new", slow), modules=["new"])
    process = subprocess.Popen(
        [bench.python, bench.agent.place, "provision"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps(order | {"protocol": PROTOCOL}))
    process.stdin.close()
    if point == "importing":
        while not mark.exists():
            assert process.poll() is None
    else:
        while point not in process.stdout.readline():
            assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert bench.imports("old")
    assert not bench.imports("new")
    mark.touch()
    assert bench.agent.ask("provision", order)["changed"]
    assert bench.imports("new")
    assert len(bench.environments()) == 1, "what the killed one had begun was left"


def test_a_wheel_that_was_damaged_is_asked_for_again(bench: Bench) -> None:
    bench.old()
    wheel = make_wheel(bench.source, "new", "new")
    order = bench.order(wheel, modules=["new"])
    with (bench.root / "wheels" / wheel.name).open("ab") as file:
        file.write(b"damage")
    (bench.root / "wheels" / bench.pip.name).unlink()
    assert bench.agent.ask("provision", order)["missing"] == [bench.pip.name, wheel.name]
    assert bench.imports("old")


def test_what_does_not_import_is_refused(bench: Bench) -> None:
    bench.old()
    order = bench.order(make_wheel(bench.source, "new", "new", "import ctypes.absent"), modules=["new"])
    with pytest.raises(StageError, match=r"does not work: ModuleNotFoundError: No module named 'ctypes\.absent'"):
        bench.agent.ask("provision", order)
    assert bench.imports("old")


def test_the_system_s_packages_are_seen_where_they_are_needed(bench: Bench) -> None:
    """TensorRT is the system's; pip stands in for it."""
    new = make_wheel(bench.source, "new", "new")
    with pytest.raises(StageError, match="No module named 'pip'"):
        bench.agent.ask("provision", bench.order(new, modules=["new", "pip"]))
    if subprocess.run([sys._base_executable, "-c", "import pip"], capture_output=True).returncode != 0:
        pytest.skip("this system's Python has no pip")
    assert bench.agent.ask("provision", bench.order(new, modules=["new", "pip"], system=True))["changed"]


def test_an_environment_that_broke_is_made_again(bench: Bench) -> None:
    order = bench.order(make_wheel(bench.source, "new", "new"), modules=["new"])
    bench.agent.ask("provision", order)
    (module,) = (bench.root / "environment").glob("lib/python3*/site-packages/new.py")
    module.unlink()
    assert bench.agent.ask("provision", order)["changed"]
    assert bench.imports("new")
    (bench.root / "environment" / "bin" / "python").unlink()
    assert bench.agent.ask("provision", order)["changed"]
    assert bench.imports("new")


def test_the_agent_without_numpy_says_so(bench: Bench) -> None:
    with pytest.raises(StageError, match="the Python on the device has no NumPy") as error:
        bench.agent.ask("build", {"runtime": "onnxruntime", "root": str(bench.root)})
    assert error.value.hint == "toolkit provision TARGET"


# --- which wheels --------------------------------------------------------------------------------------------


def platforms(found: Any) -> list[str]:
    options = wheels._choice(found)
    return [after for option, after in itertools.pairwise(options) if option == "--platform"]


def test_a_device_takes_what_its_c_library_takes() -> None:
    focal = SimpleNamespace(python="3.8.10", arch="aarch64", libc="glibc 2.31")
    assert platforms(focal)[0] == "manylinux_2_31_aarch64"
    assert platforms(focal)[-2:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    alpine = SimpleNamespace(python="3.12.11", arch="x86_64", libc="musl 1.2.5")
    assert platforms(alpine)[0] == "musllinux_1_2_x86_64"
    assert "cp312" in wheels._choice(alpine)


def test_a_wheel_that_there_is_not(tmp_path: Path, shelf: Path) -> None:
    found: Any = SimpleNamespace(python="3.12.11", arch="riscv64", libc="musl 1.2.5")
    with pytest.raises(StageError) as error:
        wheels.gather({"onnxruntime": ""}, found, tmp_path / "cache", None)
    assert error.value.message == ("there is no wheel of onnxruntime for Python 3.12.11 on riscv64 with musl 1.2.5")
    (shelf / "pillow-1.0-py3-none-any.whl").unlink()
    with pytest.raises(StageError, match=f"there is no wheel of pillow for .* in {shelf}") as error:
        wheels.gather(dict.fromkeys(ORDINARY, ""), found, tmp_path / "cache", shelf)
    assert "--wheels DIR" in str(error.value.hint)
    with pytest.raises(UsageError, match="is not a folder"):
        wheels.gather({}, found, tmp_path / "cache", tmp_path / "none")
    assert not list((tmp_path / "cache").glob("*.whl"))


def test_a_python_that_openvino_has_no_wheel_for(tmp_path: Path, shelf: Path) -> None:
    made = make_wheel(shelf, "openvino", "openvino", version="2025.2.0")
    made.rename(shelf / "openvino-2025.2.0-1-cp310-cp310-manylinux_2_31_aarch64.whl")
    wanted = dict.fromkeys(("numpy", "pillow"), "") | {"openvino": ">=2025.0"}
    focal: Any = SimpleNamespace(python="3.8.10", arch="aarch64", libc="glibc 2.31")
    with pytest.raises(StageError) as error:
        wheels.gather(wanted, focal, tmp_path / "cache", shelf)
    assert error.value.message == (
        f"there is no wheel of openvino>=2025.0 for Python 3.8.10 on aarch64 with glibc 2.31 in {shelf}"
    )
    assert "name another Python there (python: in the target file)" in str(error.value.hint)
    newer: Any = SimpleNamespace(python="3.10.12", arch="aarch64", libc="glibc 2.35")
    assert len(wheels.gather(wanted, newer, tmp_path / "cache", shelf)) == 4


def test_wheels_from_a_folder(tmp_path: Path, shelf: Path) -> None:
    found: Any = SimpleNamespace(python="3.11.2", arch="x86_64", libc="glibc 2.36")
    wanted = dict.fromkeys(ORDINARY, "")
    taken = wheels.gather(wanted, found, tmp_path / "cache", shelf)
    assert [path.name for path in taken] == sorted(path.name for path in shelf.iterdir())
    assert wheels.gather(wanted, found, tmp_path / "cache", shelf) == taken
    changed = make_wheel(shelf, "numpy", "numpy", "version = 2\n")
    again = {path.name: path for path in wheels.gather(wanted, found, tmp_path / "cache", shelf)}
    assert again[changed.name].read_bytes() == changed.read_bytes()


def test_without_a_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    found: Any = SimpleNamespace(python="3.11.2", arch="x86_64", libc="glibc 2.36")
    with pytest.raises(StageError, match="pip reaches no package index") as error:
        wheels.gather({"numpy": ""}, found, tmp_path, None)
    assert "--wheels DIR" in str(error.value.hint)


def test_what_a_gpu_s_target_needs() -> None:
    jetson = files.load_target("jetson-orin")
    assert provision.needs(jetson, parse(ORIN), "orin") == {"cuda-python": "==12.*", "pillow": ""}
    newer = ORIN.replace("cuda=", "x=").replace("540.4.0", "580.00").replace("package=numpy", "x=")
    assert provision.needs(jetson, parse(newer), "orin") == {"cuda-python": "==13.*", "numpy": "", "pillow": ""}
    for target, found in ((jetson, COMMON), (files.load_target("t4"), ORIN)):
        with pytest.raises(StageError, match="run in a container there, which brings"):
            provision.needs(target, parse(found), "shelf")
    ahead = files.load_target("t4").using("tensorrt-rtx")
    version = facts.runtimes().get("tensorrt-rtx")
    assert provision.needs(ahead, parse(T4), "t4")["tensorrt-rtx-cu13"] == (f"=={version}" if version else "")


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(tmp_path_factory.mktemp("ssh"))


@pytest.fixture
def server(keys: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TOOLKIT_SSH_CONFIG", str(keys.config))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    keys.start()
    yield keys
    keys.stop()
    keys.forget()


def aim(folder: Path, python: str, root: str = "~/.toolkit") -> Path:
    """Point the small job at the server."""
    (folder / "targets").mkdir(exist_ok=True)
    text = f"{TARGET}host: orin\npython: {python}\nroot: {root}\nbuild: {{where: device}}\n"
    (folder / "targets" / "tiny.yaml").write_text(text)
    return folder


@needs_sshd
def test_the_whole_job_on_a_device_that_had_nothing(server: Server, finished_copy: Path, bare: str) -> None:
    aim(finished_copy, bare)
    sick = run_toolkit(finished_copy, "doctor", "tiny")
    assert sick.returncode == 1
    assert sick.stdout.count("hint: toolkit provision tiny --host orin") == 2, sick.stdout
    early = run_toolkit(finished_copy, "run", "tiny", "--precision", "int8")
    assert early.returncode == 1
    assert "the Python there (3." in early.stderr
    assert "Traceback" not in early.stderr
    done = run_toolkit(finished_copy, "provision", "tiny")
    assert done.returncode == 0, done.stderr
    assert "orin provisioned" in done.stdout
    assert "onnxruntime" in done.stdout
    root = server.home("orin") / ".toolkit"
    made = {path: path.lstat().st_mtime_ns for path in root.rglob("*")}
    again = run_toolkit(finished_copy, "provision", "tiny", env={"PIP_INDEX_URL": "http://127.0.0.1:9/simple"})
    assert again.returncode == 0, again.stderr
    assert "orin is provisioned already" in again.stdout
    changed = {path for path in root.rglob("*") if made.get(path) != path.lstat().st_mtime_ns}
    assert changed <= {root / "lock", root / "lease.lock"}
    assert run_toolkit(finished_copy, "doctor", "tiny").returncode == 0
    ran = run_toolkit(finished_copy, "run", "tiny", "--precision", "int8", "--json")
    assert ran.returncode == 0, ran.stderr
    assert (root / "current").resolve().name == json.loads(ran.stdout)["commit"]["release"]


@needs_sshd
def test_the_host_is_killed_while_it_sends(server: Server, tmp_path: Path, shelf: Path, bare: str) -> None:
    aim(tmp_path, bare)
    make_wheel(shelf, "onnxruntime", "onnxruntime", ballast=40 << 20)
    command = [sys.executable, "-m", "toolkit", "provision", "tiny", "--wheels", str(shelf)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    held = server.home("orin") / ".toolkit" / "wheels"
    while not any(path.name.startswith("onnxruntime") and path.stat().st_size for path in held.glob("*")):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (held.parent / "environment").exists()
    done = run_toolkit(tmp_path, *command[3:], "--steal")  # the killed one's lease has not expired yet
    assert done.returncode == 0, done.stderr
    assert (held.parent / "environment" / "bin" / "python").exists()
    damaged = held / "numpy-1.0-py3-none-any.whl"
    damaged.write_bytes(b"damaged")
    (held.parent / "environment").unlink()
    mended = run_toolkit(tmp_path, *command[3:])
    assert mended.returncode == 0, mended.stderr
    assert damaged.read_bytes() == (shelf / damaged.name).read_bytes()


@needs_sshd
def test_what_was_provisioned_before_stays(server: Server, tmp_path: Path, shelf: Path, bare: str) -> None:
    """Two targets of one device share its environment."""
    aim(tmp_path, bare)
    version = facts.runtimes().get("tensorrt-rtx", "1.0")
    make_wheel(shelf, "tensorrt_rtx_cu13", "tensorrt_rtx", version=version)
    make_wheel(shelf, "cuda_python", "cuda", version="13.0")
    target = (tmp_path / "targets" / "tiny.yaml").read_text()
    other = target.replace("runtime: onnxruntime", "compute_capability: sm_80\nruntime: tensorrt-rtx")
    (tmp_path / "targets" / "other.yaml").write_text(other)
    command = ("--wheels", str(shelf))
    first = run_toolkit(tmp_path, "provision", "tiny", *command)
    assert first.returncode == 0, first.stderr
    second = run_toolkit(tmp_path, "provision", "other", *command)
    assert second.returncode == 0, second.stderr
    third = run_toolkit(tmp_path, "provision", "tiny", *command)
    assert "is provisioned already" in third.stdout, third.stderr
    assert "onnxruntime 1.0" in third.stdout
    assert f"tensorrt_rtx_cu13 {version}" in third.stdout


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@needs_sshd
def test_a_device_without_room(small: Path, server: Server, tmp_path: Path, shelf: Path, bare: str) -> None:
    aim(tmp_path, bare, f"{small}/root")
    make_wheel(shelf, "numpy", "numpy", ballast=6 << 20)
    result = run_toolkit(tmp_path, "provision", "tiny", "--wheels", str(shelf))
    assert result.returncode == 1, result.stdout
    assert f"free below {small}/root, and the runtime needs" in result.stderr
    assert not list((small / "root" / "wheels").glob("*")), "bytes were sent"


@needs_sshd
def test_a_device_without_python(server: Server, tmp_path: Path) -> None:
    result = run_toolkit(aim(tmp_path, "/no/such/python"), "provision", "tiny")
    assert result.returncode == 1
    assert "error: orin: Python does not run there" in result.stderr
    assert "python in the target file" in result.stderr


def test_this_machine_needs_nothing(tmp_path: Path) -> None:
    result = run_toolkit(tmp_path, "provision", "linux-cpu")
    assert result.returncode == 0
    assert "there is nothing to provision" in result.stdout
