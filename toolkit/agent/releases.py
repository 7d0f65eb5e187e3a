"""Releases on the device: content by hash, releases of hard links, `current` switched by one atomic rename.

ROOT/incoming/<sha256>   what the host has sent and nobody has verified yet
ROOT/store/<sha256>      verified content, once
ROOT/releases/<id>/      hard links into the store, manifest.json, and its signature where it has one
ROOT/current, previous   symlinks to a release
ROOT/unchecked.json      the switch whose last check has not ended yet, and what was before it
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from . import signatures
from .protocol import Refusal

FORMAT = 1  # of the manifest
_UNCHECKED = "unchecked.json"


def digest(path: str) -> str:
    """Return a file's SHA-256 in hex."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            found.update(block)
    return found.hexdigest()


@contextlib.contextmanager
def locked(root: str) -> Iterator[None]:
    """Hold the device's lock; it ends with the process, however that ends."""
    os.makedirs(root, exist_ok=True)
    with open(os.path.join(root, "lock"), "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync(path: str) -> None:
    """Bring a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _linked(root: str, name: str) -> str | None:
    """Return the id that ``current`` or ``previous`` points to."""
    try:
        return os.path.basename(os.readlink(os.path.join(root, name)))
    except OSError:
        return None


def links(root: str) -> dict[str, str | None]:
    """Return the ids that ``current`` and ``previous`` point to."""
    return {"current": _linked(root, "current"), "previous": _linked(root, "previous")}


def damaged_files(folder: str, manifest: dict[str, Any], digest: Callable[[str], str] = digest) -> list[str]:
    """Return the names of a release's files that are missing or not what the manifest says."""
    bad = []
    for name, entry in manifest["files"].items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or digest(path) != entry["sha256"]:
            bad.append(name)
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
            if json.load(file) != manifest:
                bad.append("manifest.json")
    except (OSError, ValueError):
        bad.append("manifest.json")
    return bad


def inventory(request: dict[str, Any]) -> dict[str, Any]:
    """Say what of a release is here, verified by hash.

    Args:
        request: ``root``, and ``manifest`` of the release in question.

    Returns:
        ``installed`` (whole and verified), ``damaged`` (files of it that are not what they should be),
        ``missing`` (SHA-256 of content to send), ``begun`` (what an earlier push has sent of it: SHA-256 of the
        content to ``bytes`` and ``sha256`` of its beginning), ``signed_by`` (None when its signature is missing or
        does not count), ``guarded`` (whether releases have to be signed here), ``current``, ``previous``,
        ``free_bytes``, ``unchecked`` (whether the last check of the switch to ``current`` never ended).
    """
    root, manifest = request["root"], request["manifest"]
    for folder in ("incoming", "store", "releases"):
        os.makedirs(os.path.join(root, folder), exist_ok=True)
    folder = os.path.join(root, "releases", manifest["id"])
    there = os.path.isdir(folder)
    damaged = damaged_files(folder, manifest) if there else []
    signature = os.path.join(folder, signatures.SIGNATURE)
    signed = signatures.examine(root, manifest["id"], canonical(manifest), signature)
    if there and signed["refused"]:
        damaged.append(signatures.SIGNATURE)
    missing = set()
    if damaged or not there:
        for entry in manifest["files"].values():
            content = os.path.join(root, "store", entry["sha256"])
            if not os.path.isfile(content) or digest(content) != entry["sha256"]:
                missing.add(entry["sha256"])
    begun = {}
    for name in missing:
        sent = os.path.join(root, "incoming", name)
        if os.path.isfile(sent):
            begun[name] = {"bytes": os.path.getsize(sent), "sha256": digest(sent)}
    return {
        "installed": there and not damaged,
        "damaged": damaged,
        "missing": sorted(missing),
        "begun": begun,
        "signed_by": signed["signed_by"],
        "guarded": signatures.guarded(root),
        "free_bytes": shutil.disk_usage(root).free,
        "unchecked": _unchecked(root) is not None,
        **links(root),
    }


def install(request: dict[str, Any]) -> dict[str, Any]:
    """Verify what was sent and put the release together; it is not current by that.

    Args:
        request: ``root``, ``manifest``, and ``signature`` of it; None where there is none, or it is here already.

    Raises:
        Refusal: A file that was sent is not what the manifest says, or its signature does not count here.
    """
    root, manifest = request["root"], request["manifest"]
    with locked(root):
        signature = _receive_signature(root, manifest, request.get("signature"))
        for name, entry in sorted(manifest["files"].items()):
            content = os.path.join(root, "store", entry["sha256"])
            sent = os.path.join(root, "incoming", entry["sha256"])
            if os.path.isfile(sent):
                found = digest(sent)
                if found != entry["sha256"]:
                    os.unlink(sent)
                    raise Refusal(
                        "{} arrived damaged: its SHA-256 is {}".format(name, found), "run the same command again"
                    )
                sync(sent)
                os.replace(sent, content)
            elif not os.path.isfile(content):
                raise Refusal("{} was not sent".format(name), "run the same command again")
        folder = os.path.join(root, "releases", manifest["id"])
        staged = folder if os.path.isdir(folder) else folder + ".partial"
        if staged != folder:
            shutil.rmtree(staged, ignore_errors=True)
            os.makedirs(staged)
        for name, entry in manifest["files"].items():
            path = os.path.join(staged, name)
            content = os.path.join(root, "store", entry["sha256"])
            if os.path.exists(path) and os.path.samefile(path, content):
                continue
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + ".new")
            os.link(content, path + ".new")
            os.replace(path + ".new", path)
        _write(os.path.join(staged, "manifest.json"), manifest)
        if signature is not None:
            os.replace(signature, os.path.join(staged, signatures.SIGNATURE))
        for top, _, _ in os.walk(staged):
            sync(top)
        sync(os.path.join(root, "store"))
        if staged != folder:
            os.rename(staged, folder)
        sync(os.path.join(root, "releases"))
    return {"id": manifest["id"]}


def _receive_signature(root: str, manifest: dict[str, Any], text: str | None) -> str | None:
    """Return where a signature that was sent lies; refuses one that does not count before anything is touched."""
    release = manifest["id"]
    installed = os.path.join(root, "releases", release, signatures.SIGNATURE)
    sent = os.path.join(root, "incoming", release + ".sig")
    if text is not None:
        with open(sent, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    signatures.require(root, release, canonical(manifest), installed if text is None else sent)
    return None if text is None else sent


def canonical(manifest: dict[str, Any]) -> bytes:
    """Return the bytes that a manifest's name is a hash of, and that its signature signs."""
    content = {key: value for key, value in manifest.items() if key != "id"}
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def identity(manifest: dict[str, Any]) -> str:
    """Return a release's name: a hash of its manifest, which holds the hash of every file."""
    return hashlib.sha256(canonical(manifest)).hexdigest()[:16]


def read_manifest(folder: str) -> dict[str, Any]:
    """Return a release's manifest; refuses one that is missing or is not what the release's name stands for."""
    release = os.path.basename(folder)
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
            manifest = json.load(file)
    except FileNotFoundError:
        raise Refusal("there is no release {}".format(release), "push it again") from None
    except ValueError:
        manifest = {}
    if not isinstance(manifest, dict) or identity(manifest) != release:
        raise Refusal("release {} is damaged: manifest.json".format(release), "push it again")
    return dict(manifest)


def require_signed(folder: str) -> dict[str, Any]:
    """Return a release's manifest; refuses one whose signature does not count here."""
    manifest = read_manifest(folder)
    root = os.path.dirname(os.path.dirname(folder))
    signature = os.path.join(folder, signatures.SIGNATURE)
    signatures.require(root, os.path.basename(folder), canonical(manifest), signature)
    return manifest


def manifest(request: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of ``root``'s current release, as ``manifest``; None where no release is current."""
    current = _linked(request["root"], "current")
    if current is None:
        return {"manifest": None}
    return {"manifest": read_manifest(os.path.join(request["root"], "releases", current))}


def require_whole(folder: str) -> None:
    """Refuse a release whose signature does not count, or that is not what its manifest says, naming the files."""
    damaged = damaged_files(folder, require_signed(folder))
    if damaged:
        release = os.path.basename(folder)
        raise Refusal("release {} is damaged: {}".format(release, ", ".join(damaged)), "push it again")


def switch(request: dict[str, Any]) -> dict[str, Any]:
    """Make a release current; the one before stays as ``previous``.

    Args:
        request: ``root`` and ``id``.

    Returns:
        ``current``, ``previous``, and ``was``: both as they were before, for :func:`restore`; before the first
        try, where an earlier one has ended before its last check.

    Raises:
        Refusal: The release is not here, or not whole.
    """
    root, wanted = request["root"], request["id"]
    with locked(root):
        require_whole(os.path.join(root, "releases", wanted))
        was, begun = links(root), _unchecked(root)
        if was["current"] == wanted:
            was = begun or was
        else:
            _write(os.path.join(root, _UNCHECKED), {"id": wanted, "was": was})
            if was["current"] is not None:
                _point(root, "previous", was["current"])
            _point(root, "current", wanted)
        return dict(links(root), was=was)


def restore(request: dict[str, Any]) -> dict[str, Any]:
    """Undo a switch; does nothing when another one has come since.

    Args:
        request: ``root``, ``id`` (what was switched to), ``was`` (what :func:`switch` returned).

    Returns:
        ``current`` and ``previous``.

    Raises:
        Refusal: What was current is not whole any more.
    """
    root, was = request["root"], request["was"]
    with locked(root):
        if _linked(root, "current") == request["id"]:
            if was["current"] is not None:
                require_whole(os.path.join(root, "releases", was["current"]))
            for name in ("current", "previous"):
                if was[name] is not None:
                    _point(root, name, was[name])
                else:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(root, name))
            _forget(root)
        return links(root)


def confirm(request: dict[str, Any]) -> dict[str, Any]:
    """Note that the last check of the switch to ``id`` has ended well; returns ``current`` and ``previous``."""
    root = request["root"]
    with locked(root):
        if _linked(root, "current") == request["id"]:
            _forget(root)
        return links(root)


def _unchecked(root: str) -> dict[str, Any] | None:
    """Return what was before the switch to what is current, when its last check has not ended."""
    try:
        with open(os.path.join(root, _UNCHECKED), encoding="utf-8") as file:
            begun = json.load(file)
    except FileNotFoundError:
        return None
    return dict(begun["was"]) if begun["id"] == _linked(root, "current") else None


def _forget(root: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(root, _UNCHECKED))
    sync(root)


def _write(path: str, content: dict[str, Any]) -> None:
    """Write JSON so that a reader sees all of it or what was there before."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)


def _point(root: str, name: str, release: str) -> None:
    temporary = os.path.join(root, ".{}.new".format(name))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(os.path.join("releases", release), temporary)
    os.replace(temporary, os.path.join(root, name))
    sync(root)
