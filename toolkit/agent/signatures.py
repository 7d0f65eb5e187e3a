"""Whose releases this device takes: with ROOT/allowed_signers, those that a key in it has signed.

ROOT/allowed_signers                 OpenSSH's format (ssh-keygen(1), ALLOWED SIGNERS); may be a link to a file that
                                     an administrator keeps
ROOT/releases/<id>/manifest.json.sig signature of the manifest's canonical bytes, by ``ssh-keygen -Y sign``
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import subprocess
from typing import Any

from .protocol import Refusal

NAMESPACE = "edge-toolkit"
SIGNATURE = "manifest.json.sig"
SIGNERS = "allowed_signers"
_KEY = re.compile(r"(?:^|\s)((?:ssh|ecdsa|sk)-[\w@.-]+)\s+(AAAA[\w+/]+=*)")


def guarded(root: str) -> bool:
    """Tell whether releases have to be signed here; also when the list of keys is a link to nowhere."""
    return os.path.lexists(os.path.join(root, SIGNERS))


def require(root: str, release: str, content: bytes, signature: str) -> str | None:
    """Return who signed a release, None where nobody has to.

    Args:
        root: Of the releases.
        release: Its name.
        content: What is signed: the manifest's canonical bytes.
        signature: Path of the signature.

    Raises:
        Refusal: It is not signed by a key that counts here.
    """
    if not guarded(root):
        return None
    signers = os.path.join(root, SIGNERS)
    try:
        with open(signers, "rb"):
            pass
    except OSError as error:
        raise Refusal(
            "nobody can say whose releases are taken: {}: {}".format(error.strerror, signers),
            "mend that file or link; where releases run in a container it has to be a file",
        ) from None
    if not os.path.isfile(signature):
        raise Refusal(
            "release {} is not signed, and only signed ones are taken".format(release),
            "push it again with a key that is trusted there; `toolkit trust TARGET --list` names them",
        )
    found = _keygen("find-principals", "-s", signature, "-f", signers)
    if found.returncode != 0:
        raise Refusal(
            "release {} is signed with a key that is not trusted: {}".format(
                release, fingerprint(release, content, signature)
            ),
            "push it again with a trusted key, or trust that one: toolkit trust TARGET --key FILE.pub",
        )
    principal = found.stdout.decode().splitlines()[0].split(",")[0]
    checked = _keygen("verify", "-n", NAMESPACE, "-I", principal, "-s", signature, "-f", signers, content=content)
    if checked.returncode != 0:
        fingerprint(release, content, signature)
        raise Refusal(
            "the signature of release {} by {} does not count: {}".format(release, principal, _last(checked)),
            "look at the key's line in {}: its namespaces and dates".format(signers),
        )
    return principal


def fingerprint(release: str, content: bytes, signature: str) -> str:
    """Return the key that made a signature, as ``ED25519 key SHA256:...``, whether or not it is trusted.

    Raises:
        Refusal: The signature is not of this content.
    """
    found = _keygen("check-novalidate", "-n", NAMESPACE, "-s", signature, content=content)
    if found.returncode != 0:
        raise Refusal(
            "release {} is damaged: {} does not fit its manifest.json".format(release, SIGNATURE), "push it again"
        )
    return found.stdout.decode().strip().rpartition(" with ")[2]


def examine(root: str, release: str, content: bytes, signature: str) -> dict[str, str | None]:
    """Return ``signed_by`` and ``refused``: who signed a release, or why it is not taken.

    Where anybody's are taken, it is the key that signed it, or None where there is no signature that fits.
    """
    try:
        if guarded(root):
            who = require(root, release, content, signature)
        else:
            who = fingerprint(release, content, signature) if os.path.isfile(signature) else None
    except Refusal as refusal:
        return {"signed_by": None, "refused": refusal.message if guarded(root) else None}
    return {"signed_by": who, "refused": None}


def signers(request: dict[str, Any]) -> dict[str, Any]:
    """Return ``signers``: ``principal``, ``type`` and ``fingerprint`` of each key that is trusted; see ``root``."""
    return {"signers": _parsed(_lines(os.path.join(request["root"], SIGNERS)))}


def trust(request: dict[str, Any]) -> dict[str, Any]:
    """Trust more keys.

    Args:
        request: ``root``, and ``keys``: lines for allowed_signers; a key that is in it already stays as it is.

    Returns:
        As :func:`signers`.

    Raises:
        Refusal: The file is somebody else's: a link.
    """
    path = os.path.join(request["root"], SIGNERS)
    lines = _lines(path)
    known = [key["fingerprint"] for key in _parsed(lines)]
    new = [line for line in request["keys"] if _parsed([line])[0]["fingerprint"] not in known]
    if new:
        if os.path.islink(path):
            raise Refusal(
                "{} is a link to {}, which others keep".format(path, os.readlink(path)), "add the key there"
            )
        os.makedirs(request["root"], exist_ok=True)
        with open(path + ".new", "w", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines + new))
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
    return {"signers": _parsed(lines + new)}


def _lines(path: str) -> list[str]:
    if not os.path.lexists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()


def _parsed(lines: list[str]) -> list[dict[str, str]]:
    found = []
    for line in lines:
        match = _KEY.search(line)
        if match is None or line.lstrip().startswith("#"):
            continue
        try:
            digest = hashlib.sha256(base64.b64decode(match.group(2))).digest()
        except binascii.Error:
            continue
        encoded = base64.b64encode(digest).decode().rstrip("=")
        found.append(
            {"principal": line.split()[0], "type": match.group(1), "fingerprint": "SHA256:{}".format(encoded)}
        )
    return found


def _keygen(action: str, *arguments: str, content: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        done = subprocess.run(
            ["ssh-keygen", "-Y", action, *arguments],
            input=content,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
        )
    except OSError:
        raise Refusal(
            "signatures cannot be checked: there is no ssh-keygen",
            "install openssh-client there (in the image, where releases run in a container)",
        ) from None
    if b"usage:" in done.stderr:
        raise Refusal("signatures cannot be checked: ssh-keygen is too old", "install OpenSSH 8.2 or newer there")
    return done


def _last(done: subprocess.CompletedProcess[bytes]) -> str:
    said = (done.stderr + done.stdout).decode("utf-8", "replace").strip().splitlines()
    return said[0] if said else "exit {}".format(done.returncode)
