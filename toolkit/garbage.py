"""What none of the last runs and sweeps refers to, and no interrupted run goes on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from toolkit.errors import disk_errors
from toolkit.store import Store


def collect(build: Path, keep: int, *, remove: bool) -> list[tuple[Path, int]]:
    """List (and remove) artifacts and folders that none of the last ``keep`` runs and sweeps refers to.

    What was made since the last recorded run stays: an interrupted one continues with it.

    Returns:
        Each folder with its size in bytes.

    Raises:
        StageError: A run is using the store.
    """
    runs = _newest_first(build / "runs")
    sweeps = _newest_first(build / "sweeps")
    of_sweeps: set[str] = set()  # a sweep counts as one run, however many it has made
    for path in sweeps[:keep]:
        if (path / "sweep.json").exists():
            candidates = json.loads((path / "sweep.json").read_text())["candidates"]
            of_sweeps |= {candidate["run"] for candidate in candidates}
    alone = [path for path in runs if path.name not in of_sweeps]
    kept: set[tuple[str, str]] = set()
    for path in [*alone[:keep], *(path for path in runs if path.name in of_sweeps)]:
        record = json.loads((path / "run.json").read_text()) if (path / "run.json").exists() else {}
        for made in (record, *record.get("hosts", ())):
            kept |= set(made.get("artifacts", {}).items())
    since = max((path.stat().st_mtime for path in runs), default=0.0)
    found = of_store(Store(build / "store"), kept, since, remove=remove)
    return found + _taken([*alone[keep:], *sweeps[keep:]], remove=remove)


def of_store(store: Store, keep: set[tuple[str, str]], since: float, *, remove: bool) -> list[tuple[Path, int]]:
    """List (and remove) a store's artifacts that are not in ``keep``, and what broken runs left behind.

    Args:
        store: It.
        keep: (stage, key) of what stays.
        since: Time, in seconds of the epoch: what was made later stays, whoever interrupted run it is of.
        remove: Whether to remove what is listed.

    Returns:
        Each folder with its size in bytes.

    Raises:
        StageError: A run is using the store.
    """
    root = store.root
    if not root.is_dir():
        return []
    with disk_errors(root, "the store"), store.unused():
        artifacts = [path for path in root.glob("[!.]*/*") if path.is_dir()]
        unnamed = [path for path in artifacts if (path.parent.name, path.name) not in keep]
        old = [path for path in [*unnamed, *root.glob(".resume/*")] if path.stat().st_mtime <= since]
        return _taken([*old, *root.glob(".partial/*")], remove=remove)


def _taken(folders: list[Path], *, remove: bool) -> list[tuple[Path, int]]:
    """Return each folder with its size in bytes, and remove them if asked for."""
    found = []
    for path in folders:
        found.append((path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file())))
        if remove:
            shutil.rmtree(path)
    return found


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("*") if path.is_dir()), reverse=True)
