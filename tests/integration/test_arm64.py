"""The agent's image for arm64, built and run under qemu."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.integration.conftest import build_base, is_native
from tests.integration.measuring import measure
from toolkit import containers
from toolkit.devices.container import ContainerDevice
from toolkit.devices.local import LocalDevice

pytestmark = pytest.mark.arm64

BINFMT = Path("/proc/sys/fs/binfmt_misc")


@pytest.fixture(scope="module")
def emulated(daemon: None) -> None:
    """A kernel that hands arm64 programs to qemu, which it opens once, so that containers need not have it."""
    if is_native("arm64") or (BINFMT / "qemu-aarch64").exists():
        return
    if not shutil.which("qemu-aarch64-static"):
        pytest.skip("not installed: qemu-aarch64-static (apt-get install qemu-user-static binfmt-support)")
    pytest.skip(
        f"arm64 is not registered: mount -t binfmt_misc none {BINFMT} && update-binfmts --enable qemu-aarch64"
    )


def test_the_agent_measures_on_arm64(emulated: None, tmp_path: Path) -> None:
    build_base("arm64", tmp_path)
    engine = containers.find_engine()
    image = containers.build_image(engine, "agent", print, platform="linux/arm64")
    (tmp_path / "device").mkdir()
    device = ContainerDevice(LocalDevice(tmp_path / "device"), engine, image.tag, gpu=False)
    assert device.facts()["arch"] == "aarch64"
    result = measure(device, tmp_path)
    assert (result["accuracy"], result["images"]) == (1.0, 64)
