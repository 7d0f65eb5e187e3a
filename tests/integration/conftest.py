"""A docker daemon of the tests' own, and stand-ins for the base images: a debootstrapped Debian."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toolkit-tests"
DOCKER = "/usr/bin/docker"  # Debian's: it builds with BuildKit and without buildx
DAEMON = "/usr/sbin/dockerd"
BASE = ("python3", "python3-pip", "python3-venv", "python3-numpy", "ca-certificates")
SLIM = "standin/python:3.11-slim"
SECRET = "a-token-that-no-image-may-hold"


def docker(*arguments: str, stdin: bytes | None = None) -> str:
    """Run the docker client against the tests' daemon; returns its stdout."""
    finished = subprocess.run([DOCKER, *arguments], input=stdin, capture_output=True)
    assert finished.returncode == 0, finished.stderr.decode()
    return finished.stdout.decode().strip()


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A dockerd with its own socket and storage; the environment points at it and at the stand-ins."""
    if os.geteuid() != 0:
        pytest.skip("a docker daemon needs root")
    if missing := [name for name in (DOCKER, DAEMON, "debootstrap") if not shutil.which(name)]:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install docker.io debootstrap)")
    folder = Path(tempfile.mkdtemp(prefix="toolkit-dockerd-"))  # a socket's path is short
    command = [DAEMON, "--bridge=none", "--iptables=false", "-H", f"unix://{folder}/socket", "-p", f"{folder}/pid"]
    command += ["--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec"]
    settings = tmp_path_factory.mktemp("pip") / "pip.conf"
    settings.write_text(f"[global]\ntimeout = 120\n# {SECRET}\n")
    with (folder / "log").open("wb") as log, pytest.MonkeyPatch.context() as patch:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        )
        try:
            patch.setenv("DOCKER_BUILDKIT", "1")
            patch.setenv("DOCKER_HOST", f"unix://{folder}/socket")
            patch.setenv("TOOLKIT_CONTAINER_ENGINE", DOCKER)
            patch.setenv("TOOLKIT_NETWORK", "host")
            patch.setenv("TOOLKIT_PYTHON", SLIM)
            patch.setenv("TOOLKIT_NGC", "standin")
            patch.setenv("PIP_CONFIG_FILE", str(settings))
            for _ in range(300):
                if (
                    process.poll() is not None
                    or subprocess.run([DOCKER, "info"], capture_output=True).returncode == 0
                ):
                    break
                time.sleep(0.1)
            if process.poll() is not None:
                pytest.skip(f"dockerd does not start here: {(folder / 'log').read_text().splitlines()[-1]}")
            yield
        finally:
            process.terminate()
            process.wait(timeout=60)
            # dockerd leaves a mount of its network namespace behind
            subprocess.run(["umount", f"{folder}/exec/netns/default"], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)


def debian(architecture: str, packages: Sequence[str] = BASE) -> Path:
    """Return a tar of a Debian with some packages; made once and kept in the cache."""
    included = ",".join(packages)
    tar = CACHE / f"bookworm-{architecture}-{hashlib.sha256(included.encode()).hexdigest()[:8]}.tar"
    if not tar.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = ["debootstrap", f"--arch={architecture}", "--variant=minbase", f"--include={included}"]
            subprocess.run([*command, "bookworm", f"{folder}/root"], check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["tar", "-C", f"{folder}/root", "-cf", f"{folder}/tar", "."], check=True)
            Path(f"{folder}/tar").rename(tar)
    return tar


def build_base(architecture: str, folder: Path) -> None:
    """Make the stand-in for a slim Python: the Debian, and this host's certificates for its pip."""
    shutil.copy(debian(architecture), folder / "debian.tar")
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", folder)
    (folder / "Dockerfile").write_text(
        "FROM scratch\nADD debian.tar /\nCOPY ca-certificates.crt /etc/ssl/certs/\n"
        "ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt\n"
    )
    docker("build", "--platform", f"linux/{architecture}", "--tag", SLIM, str(folder))


def is_native(architecture: str) -> bool:
    """Tell whether this machine is of an architecture, as docker calls it."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine()) == architecture
