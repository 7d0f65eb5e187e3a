"""What a host's name means to OpenSSH: asked of ``ssh -G``, which reads its configuration best."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import StageError, UsageError


@dataclass(frozen=True)
class Address:
    """What OpenSSH's own configuration says of a host, its includes and matches resolved.

    Attributes:
        name: What the user typed.
        options: Keyword in lower case to its values, as ``ssh -G`` prints them.
    """

    name: str
    options: dict[str, list[str]]

    @classmethod
    def resolve(cls, name: str) -> Address:
        """Ask ``ssh -G``; raises UsageError for what is no host name, StageError where there is no ssh."""
        host, _, port = name.rpartition(":") if name.rpartition(":")[2].isdigit() else (name, "", "")
        if not host or host.startswith("-") or any(c.isspace() for c in name):
            raise UsageError(f"'{name}' is no host", "write a name of ~/.ssh/config, or user@host[:port]")
        command = [*_ssh(), "-G", *(["-p", port] if port else []), "--", host]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except OSError as error:
            raise StageError("there is no ssh on this machine", "sudo apt-get install openssh-client") from error
        if found.returncode != 0:
            reason = (found.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise UsageError(f"ssh does not take '{name}': {reason}", "correct ~/.ssh/config, or the name")
        options: dict[str, list[str]] = {}
        for line in found.stdout.splitlines():
            key, _, value = line.partition(" ")
            options.setdefault(key.lower(), []).append(value)
        return cls(name, options)

    def get(self, key: str) -> str | None:
        """Return an option's value; None where it is not set."""
        value = self.options.get(key, ["none"])[0]
        return None if value == "none" else value

    @property
    def hostname(self) -> str:
        """Name or address to connect to."""
        return self.options["hostname"][0]

    @property
    def port(self) -> int:
        """Port to connect to."""
        return int(self.options["port"][0])

    @property
    def user(self) -> str:
        """User to log in as."""
        return self.options["user"][0]

    def seconds(self, key: str, default: float) -> float:
        """Return an option in seconds, or a default where it is not set or 0."""
        return float(self.get(key) or 0) or default

    def paths(self, key: str) -> list[Path]:
        """Return an option of files that exist."""
        named = [Path(word).expanduser() for value in self.options.get(key, []) for word in shlex.split(value)]
        return [path for path in named if path.is_file()]

    @property
    def proxy(self) -> str | None:
        """Command whose streams are the connection, where the host is behind another."""
        jumps = self.get("proxyjump")
        if jumps is None:
            command = self.get("proxycommand")
            return None if command is None else _expand(command, self)
        *before, last = jumps.split(",")
        through = ["-J", ",".join(before)] if before else []
        target = f"[{self.hostname}]:{self.port}"
        host, _, port = last.rpartition(":") if last.rpartition(":")[2].isdigit() else (last, "", "")
        return shlex.join([*_ssh(), *through, *(["-p", port] if port else []), "-W", target, "--", host])


def _ssh() -> list[str]:
    """Return OpenSSH's client, with the configuration file that TOOLKIT_SSH_CONFIG names."""
    config = os.environ.get("TOOLKIT_SSH_CONFIG")
    return ["ssh", *(["-F", config] if config else [])]


def _expand(command: str, address: Address) -> str:
    """Fill in a ProxyCommand's tokens (ssh_config(5), TOKENS)."""
    for token, value in (
        ("%h", address.hostname),
        ("%p", str(address.port)),
        ("%r", address.user),
        ("%n", address.name),
    ):
        command = command.replace(token, value)
    return command.replace("%%", "%").removeprefix("exec ")
