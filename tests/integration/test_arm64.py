"""Devices with an arm64 processor, under qemu: the agent's image, and a Debian with an SSH server."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run_toolkit
from tests.integration.conftest import build_base, debian, is_native
from tests.integration.measuring import measure
from tests.sshd import Server, needs_sshd
from toolkit import containers, files
from toolkit.containers import building
from toolkit.delivery import upkeep
from toolkit.devices import open_device
from toolkit.devices.agent import Agent
from toolkit.devices.container import ContainerDevice
from toolkit.devices.local import LocalDevice

pytestmark = pytest.mark.arm64

BINFMT = Path("/proc/sys/fs/binfmt_misc")
SETTINGS = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")


@pytest.fixture(scope="module")
def emulated() -> None:
    """A kernel that hands arm64 programs to qemu, as it does where systemd has read the package's settings."""
    if is_native("arm64") or (BINFMT / "qemu-aarch64").exists():
        return
    if not SETTINGS.exists():
        pytest.skip("not installed: qemu-user-static")
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], check=True)
    (BINFMT / "register").write_text(SETTINGS.read_text())


class Emulated(ContainerDevice):
    """Hides the host's processors: ONNX Runtime's cpuinfo crashes where /sys lists those of another kind."""

    def command(self, argv: Sequence[str], name: str, env: Mapping[str, str] | None = None) -> list[str]:
        engine, verb, *rest = super().command(argv, name, env)
        return [engine, verb, "--mount", "type=tmpfs,target=/sys/devices/system/cpu", *rest]


def test_the_agent_measures_on_arm64(daemon: None, emulated: None, tmp_path: Path) -> None:
    build_base("arm64", tmp_path)
    engine = containers.find_engine()
    image = building.build_image(engine, "agent", print, platform="linux/arm64")
    (tmp_path / "device").mkdir()
    kind = ContainerDevice if is_native("arm64") else Emulated
    device = kind(LocalDevice(tmp_path / "device"), engine, image.tag, gpu=False)
    assert device.facts()["arch"] == "aarch64"
    result = measure(device, tmp_path)
    assert result["images"] == 64
    assert np.load(tmp_path / "logits.npy").argmax(1).tolist() == [0, 1] * 32


class Debian(Server):
    """The sshd of a Debian in a folder: its Python has no NumPy, no pip and no ensurepip, and no DNS."""

    def __init__(self, folder: Path, tree: Path) -> None:
        super().__init__(folder)
        self.tree = tree
        (tree / "etc" / "resolv.conf").unlink(missing_ok=True)
        (tree / "run" / "sshd").mkdir(exist_ok=True)
        Path(f"{tree}{folder}").mkdir(parents=True)

    def script(self) -> str:
        folder, tree = self.folder, self.tree
        # without /sys: ONNX Runtime's cpuinfo crashes where it lists processors of another kind
        return f"""
            mount --rbind /dev {tree}/dev && mount -t proc proc {tree}/proc &&
            mount --bind {folder} {tree}{folder} && mount --bind {folder}/passwd {tree}/etc/passwd &&
            exec chroot {tree} /usr/sbin/sshd -D -e -f {folder}/sshd_config
        """


@pytest.fixture
def server(emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Debian]:
    tree = tmp_path / "tree"
    tree.mkdir()
    subprocess.run(["tar", "-C", tree, "-xf", debian("arm64", ("python3", "openssh-server"))], check=True)
    server = Debian(tmp_path / "ssh", tree)
    monkeypatch.setenv("TOOLKIT_SSH_CONFIG", str(server.config))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(tree)


@needs_sshd
def test_a_bare_arm64_debian_is_provisioned_and_delivered_to(server: Debian, tmp_path: Path) -> None:
    done = run_toolkit(tmp_path, "provision", "linux-cpu", "--host", "orin", timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "orin provisioned" in done.stdout
    again = run_toolkit(tmp_path, "provision", "linux-cpu", "--host", "orin")
    assert "orin is provisioned already" in again.stdout, again.stderr
    device = open_device("orin", files.load_target("linux-cpu"), tmp_path / "build")
    assert (device.facts()["arch"], set(device.facts()["runtimes"])) == ("aarch64", {"onnxruntime"})
    result = measure(device, tmp_path)
    assert result["images"] == 64
    assert np.load(tmp_path / "logits.npy").argmax(1).tolist() == [0, 1] * 32
    agent = Agent(device)
    (release,) = upkeep.listed(agent)
    assert upkeep.activate(release.id, agent)["current"] == release.id
