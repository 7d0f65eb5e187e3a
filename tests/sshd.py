"""A real OpenSSH server: users with homes of their own, and the client's configuration for them."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

SSHD = "/usr/sbin/sshd"

needs_sshd = pytest.mark.skipif(
    not Path(SSHD).exists() or os.geteuid() != 0, reason="needs root and sshd (apt-get install openssh-server)"
)


def keygen(*arguments: str) -> None:
    subprocess.run(["ssh-keygen", "-q", *arguments], check=True)


@functools.cache
def rsa_key() -> dict[str, str]:
    """The files of one RSA key for all servers, since making one takes long."""
    with tempfile.TemporaryDirectory() as folder:
        keygen("-t", "rsa", "-N", "", "-f", f"{folder}/id_rsa")
        return {path.name: path.read_text() for path in Path(folder).iterdir()}


def free_port() -> int:
    """A port that no connection of another test is given in the meantime, as one the kernel chooses would be."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


class Server:
    """An sshd, and what ``ssh NAME`` has to know to reach it.

    Every user is a device: a name in the client's configuration, and a home at ``folder/homes/NAME``. They are
    known to this server alone, which sees an ``/etc/passwd`` of its own, and may write where root may.

    Args:
        folder: For keys, homes and configuration.
        users: Names of the devices.
        address: Where it listens.
        namespace: Network namespace (of ``ip netns``) that it runs in.
        shell: The users' shell.
    """

    def __init__(
        self,
        folder: Path,
        users: Sequence[str] = ("orin",),
        *,
        address: str = "127.0.0.1",
        namespace: str | None = None,
        shell: str = "/bin/sh",
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.users = users
        self.address = address
        self.namespace = namespace
        self.port = free_port()
        for name in ("host_key", "id_ed25519", "id_ecdsa", "stranger"):
            keygen("-t", "ecdsa" if name == "id_ecdsa" else "ed25519", "-N", "", "-f", str(folder / name))
        for name, text in rsa_key().items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o600)
        keys = [(folder / f"{name}.pub").read_text() for name in ("id_ed25519", "id_rsa", "id_ecdsa")]
        (folder / "authorized_keys").write_text("".join(keys))
        (folder / "sshd_config").write_text(
            f"ListenAddress {address}\nPort {self.port}\nHostKey {folder}/host_key\nUsePAM no\nStrictModes no\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nPermitRootLogin yes\n"
            f"Subsystem sftp internal-sftp\nPidFile none\nMaxAuthTries 20\nMaxStartups 500\n"
        )
        accounts = Path("/etc/passwd").read_text()
        for name in users:
            self.home(name).mkdir(parents=True)
            accounts += f"{name}:x:0:0::{self.home(name)}:{shell}\n"
        (folder / "passwd").write_text(accounts)
        self.known = folder / "known_hosts"
        public = " ".join((folder / "host_key.pub").read_text().split()[:2])
        self.known.write_text(f"[{address}]:{self.port} {public}\n")
        self.configure()
        self.process: subprocess.Popen[bytes] | None = None

    def home(self, name: str) -> Path:
        """A user's home, where ``~/.toolkit`` is."""
        return self.folder / "homes" / name

    @property
    def config(self) -> Path:
        """The client's configuration, for ``ssh -F`` and ``TOOLKIT_SSH_CONFIG``."""
        return self.folder / "config"

    def configure(self, **options: str) -> None:
        """Write the client's configuration, with an include as users have it."""
        plain = {
            "HostName": self.address,
            "Port": str(self.port),
            "IdentityFile": str(self.folder / "id_ed25519"),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(self.known),
            "GlobalKnownHostsFile": "/dev/null",
            "ConnectTimeout": "5",
        } | options
        lines = "".join(f"  {key} {value}\n" for key, value in plain.items())
        hosts = "".join(f"Host {name}\n  User {name}\n{lines}" for name in self.users)
        (self.folder / "hosts").write_text(hosts)
        self.config.write_text(f"Include {self.folder}/hosts\n")

    def script(self) -> str:
        """What the shell runs that becomes the server, with mounts of its own."""
        return f"mount --bind {self.folder}/passwd /etc/passwd && exec {SSHD} -D -e -f {self.folder}/sshd_config"

    def start(self) -> None:
        """Start it and wait until it answers."""
        Path("/run/sshd").mkdir(exist_ok=True)
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        log = self.folder / "sshd.log"
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*inside, "unshare", "--mount", "--propagation", "private", "sh", "-c", self.script()],
                stderr=stderr,
            )
        for _ in range(600):
            if b"Server listening" in log.read_bytes():  # where this machine may have no way to it
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"sshd does not answer: {log.read_text()}")

    def sessions(self) -> list[int]:
        """The processes that serve its connections."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def stop(self) -> None:
        """End it and the connections that it serves; it may have ended already."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGSTOP)  # so that its list of children stays
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.process = None

    def forget(self) -> None:
        """Empty the homes."""
        for name in self.users:
            shutil.rmtree(self.home(name), ignore_errors=True)
            self.home(name).mkdir()
