"""A release's signature: made here, with the user's SSH key, by OpenSSH."""

from __future__ import annotations

import base64
import binascii
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.agent.releases import canonical
from toolkit.agent.signatures import NAMESPACE
from toolkit.config import Target
from toolkit.delivery.lease import me
from toolkit.devices import Device
from toolkit.devices.agent import Agent
from toolkit.devices.ssh_address import Address
from toolkit.errors import StageError, UsageError

log = logging.getLogger(__name__)

_HERE = ("id_ed25519", "id_ecdsa", "id_rsa")


@dataclass(frozen=True)
class Trusted:
    """A key whose releases a device takes.

    Attributes:
        principal: Who it is.
        type: As ``ssh-ed25519``.
        fingerprint: As ``SHA256:...``.
    """

    principal: str
    type: str
    fingerprint: str


def key_of(target: Target) -> Path:
    """Return the key that signs for a target: its own, or the first that SSH would take to its host.

    Raises:
        UsageError: The target names a file that is not there.
        StageError: The user has no key.
    """
    if target.signing_key is not None:
        path = Path(target.signing_key).expanduser()
        if not path.is_file():
            raise UsageError(f"the signing_key {path} of '{target.name}' is not a file", "ssh-keygen -t ed25519")
        return path
    if target.host in (None, "local"):
        found = [path for name in _HERE if (path := Path.home() / ".ssh" / name).is_file()]
    else:
        found = [path for path in Address.resolve(target.host).paths("identityfile") if path.name != "id_dsa"]
    if not found:
        raise StageError("there is no SSH key to sign with", "ssh-keygen -t ed25519, or signing_key in the target")
    return found[0]


def seal(manifest: dict[str, Any], target: Target, device: Device, there: dict[str, Any]) -> str | None:
    """Return a release's signature where the device has none that counts; None where none can or need be made.

    Args:
        manifest: The release's.
        target: Its ``signing`` and ``signing_key``.
        device: Where the release goes.
        there: The agent's inventory.

    Raises:
        StageError: The release has to be signed and cannot be; or the target wants it checked, and the device
            takes releases of anybody.
    """
    if target.signing == "required" and not there["guarded"]:
        raise StageError(
            f"'{target.name}' says signing: required, and {device.name} takes releases of anybody",
            f"toolkit trust {target.name}",
        )
    if there["signed_by"] is not None:
        return None
    try:
        return sign(canonical(manifest), key_of(target), ask=there["guarded"])
    except StageError as problem:
        if there["guarded"]:
            raise StageError(f"{device.name} takes only signed releases: {problem.message}", problem.hint) from None
        log.info("the release is not signed: %s", problem.message)
        return None


def sign(content: bytes, key: Path, *, ask: bool) -> str:
    """Return the signature of some bytes, as ``ssh-keygen -Y sign`` writes it.

    Args:
        content: The bytes.
        key: A private key, or a public one whose private half is in the user's agent.
        ask: Whether its passphrase may be asked for, if there is a terminal.

    Raises:
        StageError: The key cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "manifest"
        file.write_bytes(content)
        asking = ask and sys.stdin.isatty()
        done = _keygen("-Y", "sign", "-q", "-n", NAMESPACE, "-f", str(key), str(file), asking=asking)
        if done.returncode != 0:
            said = (done.stderr or "").strip().splitlines() or ["its reason stands above"]
            raise StageError(f"the key {key} cannot sign: {said[0]}", f"ssh-add {key}, or name another signing_key")
        return file.with_name("manifest.sig").read_text(encoding="ascii")


def trusted(agent: Agent) -> list[Trusted]:
    """Return the keys whose releases a device takes; none means that it takes anybody's."""
    return [Trusted(**key) for key in agent.ask("signers", {"root": agent.device.root})["signers"]]


def trust(agent: Agent, files: Sequence[Path]) -> list[Trusted]:
    """Have a device take releases that some public keys' owners sign, and return all that it trusts.

    Raises:
        UsageError: A file is no public key.
    """
    answer = agent.ask("trust", {"root": agent.device.root, "keys": [_line(file) for file in files]})
    return [Trusted(**key) for key in answer["signers"]]


def _line(file: Path) -> str:
    """Return the line of ``allowed_signers`` for a public key; its comment says who that is.

    Raises:
        UsageError: The file is no public key.
    """
    try:
        words = file.read_text(encoding="utf-8").split()
        base64.b64decode(words[1], validate=True)
    except (OSError, ValueError, IndexError, binascii.Error):
        raise UsageError(f"{file} is no public SSH key", "name the .pub file, as ~/.ssh/id_ed25519.pub") from None
    who = re.sub(r"[^\w.@+-]+", "-", "-".join(words[2:])) or me()
    return f'{who} namespaces="{NAMESPACE}" {words[0]} {words[1]}'


def public_half(key: Path) -> Path:
    """Return the file with a key's public half; raises UsageError where there is none."""
    public = key if key.suffix == ".pub" else key.with_name(f"{key.name}.pub")
    if not public.is_file():
        raise UsageError(f"the public half of {key} is not beside it", f"ssh-keygen -y -f {key} > {public}")
    return public


def _keygen(*arguments: str, asking: bool) -> subprocess.CompletedProcess[str]:
    """Run ssh-keygen; it asks for a passphrase on this terminal or, without one to turn to, gives up."""
    silent = {"SSH_ASKPASS": "false", "SSH_ASKPASS_REQUIRE": "force"}
    environment = os.environ if asking else {**os.environ, **silent}
    try:
        return subprocess.run(
            ["ssh-keygen", *arguments],
            stdin=None if asking else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if asking else subprocess.PIPE,
            env=environment,
            start_new_session=not asking,
            text=True,
            check=False,
        )
    except OSError as error:
        raise StageError("there is no ssh-keygen on this machine", "sudo apt-get install openssh-client") from error
