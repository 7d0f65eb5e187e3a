"""All the releases on the device: what each is, and the removal of those that nobody needs."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from . import releases, signatures
from .protocol import Refusal

_STALE_SECONDS = 24 * 3600  # a push, build or benchmark that is at work may still need what is younger
_PARTIAL = ".partial"


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Say which releases are here, every file of them hashed.

    Args:
        request: ``root``.

    Returns:
        ``current``, ``previous`` (ids or None), and ``releases``, newest first: ``id``, ``installed`` (seconds
        since 1970), ``bytes``, ``damaged`` (names of files), ``signed_by`` and ``refused`` (see
        :func:`signatures.examine`), and out of the manifest, None where that is damaged: ``model``, ``data``,
        ``profile``, ``runtime``, ``precision``, ``fast``.
    """
    root = request["root"]
    known: dict[tuple[int, int], str] = {}

    def digest(path: str) -> str:  # releases share most of their content
        status = os.stat(path)
        key = (status.st_dev, status.st_ino)
        if key not in known:
            known[key] = releases.digest(path)
        return known[key]

    found = []
    for release in _newest_first(root):
        folder = os.path.join(root, "releases", release)
        try:
            manifest = releases.read_manifest(folder)
            damaged = releases.damaged_files(folder, manifest, digest)
        except Refusal:
            manifest, damaged = {}, ["manifest.json"]
        signature = os.path.join(folder, signatures.SIGNATURE)
        workload, engine = manifest.get("workload", {}), manifest.get("engine", {})
        found.append(
            {
                "id": release,
                "installed": _installed(folder),
                "bytes": sum(os.stat(path).st_size for path in _files(folder)),
                "damaged": damaged,
                **signatures.examine(root, release, releases.canonical(manifest), signature),
                "model": workload.get("model"),
                "data": workload.get("data"),
                "profile": manifest.get("profile"),
                "runtime": engine.get("runtime"),
                "precision": engine.get("precision"),
                "fast": manifest.get("fast"),
            }
        )
    return dict(releases.links(root), releases=found)


def prune(request: dict[str, Any]) -> dict[str, Any]:
    """Remove old releases, content that no release links to, and what broken-off pushes and builds have left.

    Args:
        request: ``root``, ``keep`` (how many of the newest releases stay; ``current`` and ``previous`` always do),
            ``dry_run`` (whether to remove nothing).

    Returns:
        What was, or would be, removed: ``releases`` (ids), ``contents`` (how many files of the store),
        ``leftovers`` (paths below the root), ``bytes`` (freed by all of it; content counts with its last link).
    """
    root = request["root"]
    with releases.locked(root):
        links = releases.links(root).values()
        old = [release for release in _newest_first(root)[request["keep"] :] if release not in links]
        leftovers = _leftovers(root)
        folders = [os.path.join(root, "releases", release) for release in old]
        gone: Counter[int] = Counter()
        status = {}
        for path in (path for top in folders + leftovers for path in _files(top)):
            found = os.stat(path, follow_symlinks=False)
            gone[found.st_ino] += 1
            status[found.st_ino] = found
        contents = []
        for path in _entries(root, "store"):
            found = os.stat(path)
            if found.st_nlink == gone[found.st_ino] + 1:
                gone[found.st_ino] += 1
                status[found.st_ino] = found
                contents.append(path)
        if not request["dry_run"]:
            for folder in folders:  # a release is whole or not there, whenever this ends
                os.rename(folder, folder + _PARTIAL)
            if folders:
                releases.sync(os.path.join(root, "releases"))
            for path in [folder + _PARTIAL for folder in folders] + leftovers + contents:
                if os.path.isdir(path):
                    shutil.rmtree(path)
                else:
                    os.unlink(path)
    return {
        "releases": old,
        "contents": len(contents),
        "leftovers": [os.path.relpath(path, root) for path in leftovers],
        "bytes": sum(found.st_size for inode, found in status.items() if found.st_nlink == gone[inode]),
    }


def _newest_first(root: str) -> list[str]:
    folders = [path for path in _entries(root, "releases") if not path.endswith(_PARTIAL)]
    return [os.path.basename(path) for path in sorted(folders, key=_installed, reverse=True)]


def _installed(folder: str) -> float:
    manifest = os.path.join(folder, "manifest.json")
    return os.stat(manifest if os.path.exists(manifest) else folder).st_mtime


def _leftovers(root: str) -> list[str]:
    """Return what an install or a prune has left behind, and what lies for long where things are worked on."""
    now = time.time()
    found = [path for path in _entries(root, "releases") if path.endswith(_PARTIAL)]
    for name in ("agents", "incoming", "building", "measured"):
        for path in _entries(root, name):
            if name == "agents" and not os.path.basename(path).startswith("."):
                continue  # only a copy that broke off
            touched = max(os.stat(part, follow_symlinks=False).st_mtime for part in (path, *_files(path)))
            if now - touched > _STALE_SECONDS:
                found.append(path)
    return found


def _entries(root: str, name: str) -> list[str]:
    folder = os.path.join(root, name)
    return [os.path.join(folder, entry) for entry in sorted(os.listdir(folder))] if os.path.isdir(folder) else []


def _files(top: str) -> Iterator[str]:
    """Yield the files below a folder, or the file itself."""
    if not os.path.isdir(top):
        yield top
    for folder, _, names in os.walk(top):
        for name in names:
            yield os.path.join(folder, name)
