"""The agent's image for arm64, built and run under qemu."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.integration.conftest import build_base, is_native
from tests.integration.measuring import measure
from toolkit import containers
from toolkit.containers import building
from toolkit.devices.container import ContainerDevice
from toolkit.devices.local import LocalDevice

pytestmark = pytest.mark.arm64

BINFMT = Path("/proc/sys/fs/binfmt_misc")
SETTINGS = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")


@pytest.fixture(scope="module")
def emulated(daemon: None) -> None:
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


def test_the_agent_measures_on_arm64(emulated: None, tmp_path: Path) -> None:
    build_base("arm64", tmp_path)
    engine = containers.find_engine()
    image = building.build_image(engine, "agent", print, platform="linux/arm64")
    (tmp_path / "device").mkdir()
    kind = ContainerDevice if is_native("arm64") else Emulated
    device = kind(LocalDevice(tmp_path / "device"), engine, image.tag, gpu=False)
    assert device.facts()["arch"] == "aarch64"
    result = measure(device, tmp_path)
    assert (result["accuracy"], result["images"]) == (1.0, 64)
