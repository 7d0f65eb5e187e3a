"""Whom to trust and how to be trusted: host keys, the agent's keys, key files."""

from __future__ import annotations

import functools
import logging
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import paramiko
from paramiko.auth_strategy import AuthSource, AuthStrategy, InMemoryPrivateKey
from paramiko.pkey import PublicBlob, UnknownKeyType

from toolkit.devices.ssh_address import Address
from toolkit.errors import StageError

log = logging.getLogger(__name__)

_ASKING = threading.Lock()  # a passphrase is asked for once, however many hosts are connected to at a time


class HostKeys(paramiko.MissingHostKeyPolicy):
    """Refuses a host whose key nobody knows yet, or writes it down on first use, if that was asked for."""

    def __init__(self, address: Address, accept_new: bool) -> None:
        self._address = address
        self._accept_new = accept_new

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        file = Path(shlex.split(self._address.get("userknownhostsfile") or "~/.ssh/known_hosts")[0]).expanduser()
        if self._accept_new:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as known:
                known.write(f"{hostname} {key.get_name()} {key.get_base64()}\n")
            log.warning(
                "the host key of '%s' is new and is trusted from now on: %s", self._address.name, key.fingerprint
            )
            return
        port = f"-p {self._address.port} " if self._address.port != 22 else ""
        raise StageError(
            f"the host key of '{self._address.name}' is not known: {key.get_name()} {key.fingerprint}",
            f"compare it with ssh-keygen -lf /etc/ssh/ssh_host_{_kind(key)}_key.pub on the device, then add it: "
            f"ssh-keyscan {port}{self._address.hostname} >> {file}, or --accept-new-host-key",
        )


def _kind(key: paramiko.PKey) -> str:
    return next(kind for kind in ("ed25519", "ecdsa", "rsa") if kind in key.get_name())


class Keys(AuthStrategy):
    """Tries the agent's keys, then the files of the configuration; an encrypted file is asked for once."""

    def __init__(self, address: Address) -> None:
        super().__init__(ssh_config=paramiko.SSHConfig())
        self._address = address

    def get_sources(self) -> Iterator[AuthSource]:
        user, files = self._address.user, self._address.paths("identityfile")
        only = {_public(path) for path in files} if self._address.get("identitiesonly") == "yes" else None
        offered = set()
        for key in paramiko.Agent().get_keys():
            if only is None or key.asbytes() in only:
                offered.add(key.asbytes())
                yield InMemoryPrivateKey(user, key)
        for path in files:
            if _public(path) not in offered:
                with _ASKING:
                    found = _load(path)
                if found is not None:
                    yield InMemoryPrivateKey(user, found)


def _public(path: Path) -> bytes | None:
    """Return the public half that lies beside a private key; None where it does not."""
    try:
        words = path.with_name(f"{path.name}.pub").read_text(encoding="utf-8").split()
        return PublicBlob.from_string(" ".join(words[:2])).key_blob
    except (OSError, ValueError):
        return None


@functools.cache
def _load(path: Path) -> paramiko.PKey | None:
    """Return a private key; its passphrase is asked for on a terminal, and without one the key is left out."""
    try:
        return paramiko.PKey.from_path(path)
    except (paramiko.PasswordRequiredException, TypeError):
        if not sys.stdin.isatty():
            log.warning("the key %s is encrypted and there is no terminal to ask on: ssh-add it", path)
            return None
    except (paramiko.SSHException, UnknownKeyType, ValueError, OSError) as error:
        log.info("the key %s is left out: %s", path, error)
        return None
    import click

    phrase = click.prompt(f"Passphrase of {path}", hide_input=True, err=True)
    try:
        return paramiko.PKey.from_path(path, phrase)
    except (paramiko.SSHException, ValueError) as error:
        raise StageError(f"the passphrase does not open {path}", "try again, or ssh-add it") from error
