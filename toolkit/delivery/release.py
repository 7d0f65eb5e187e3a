"""Releases: engine, agent and evaluation data with a manifest; pushed, verified on the device, switched."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import __version__, units
from toolkit.agent.releases import FORMAT, identity
from toolkit.config import Target
from toolkit.delivery import signing
from toolkit.devices import Device
from toolkit.devices.agent import Agent, pack
from toolkit.devices.content import blocks, opened
from toolkit.errors import StageError
from toolkit.store import Artifact, Progress


@dataclass(frozen=True)
class Release:
    """A release's manifest, where each of its files is on the host, and what is only in memory."""

    manifest: dict[str, Any]
    sources: dict[str, Path]
    content: dict[str, bytes]

    @property
    def id(self) -> str:
        """Name of the release: a hash of its manifest, which holds the hash of every file."""
        return str(self.manifest["id"])

    def source(self, name: str) -> Path | bytes:
        """Where a file's content is."""
        return self.sources.get(name) or self.content[name]


@dataclass(frozen=True)
class Pushed:
    """What a push did, and what it found.

    Attributes:
        sent_bytes: How much was sent.
        current: The release that is current.
        previous: The one before.
        repaired: Files of the release that were damaged.
        unchecked: Whether the last check of the switch to ``current`` never ended.
    """

    sent_bytes: int
    current: str | None
    previous: str | None
    repaired: list[str]
    unchecked: bool = False


@dataclass(frozen=True)
class Commitment:
    """Whether the release became current on its device, and why or why not.

    Attributes:
        committed: Whether it is current.
        reason: Why or why not.
        current: The release that is.
        previous: The one before.
        healthy: False when a release was switched to, did not run, and the switch was undone.
    """

    committed: bool
    reason: str
    current: str | None
    previous: str | None
    healthy: bool = True


def compose(engine: Artifact, data: Artifact, *, about: dict[str, Any], fast: bool) -> Release:
    """Put a release together; nothing in it depends on when that is done.

    Args:
        engine: Engine files.
        data: Its test split becomes the release's evaluation data.
        about: Workload, profile and contract, for whoever reads the manifest.
        fast: Whether anything in it comes from a fast run.
    """
    content = {"agent.pyz": pack()}
    sources = {name: engine.file(name) for name in engine.files}
    hashes = {name: engine.sha256(name) for name in engine.files}
    for name in ("images.npy", "labels.npy"):
        if f"test.{name}" in data.files:  # labels may be missing
            sources[f"evaluation/{name}"] = data.file(f"test.{name}")
            hashes[f"evaluation/{name}"] = data.sha256(f"test.{name}")
    files = {name: {"sha256": hashes[name], "bytes": path.stat().st_size} for name, path in sources.items()}
    for name, packed in content.items():
        files[name] = {"sha256": hashlib.sha256(packed).hexdigest(), "bytes": len(packed)}
    manifest = {
        "format": FORMAT,
        "toolkit": __version__,
        "files": dict(sorted(files.items())),
        "engine": {key: value for key, value in engine.meta.items() if key != "bytes"},
        "model": {"classes": data.meta["classes"], "input": ["uint8", 3, *[data.meta["input_size"]] * 2]},
        "fast": fast,
        **about,
    }
    return Release(manifest | {"id": identity(manifest)}, sources, content)


def push(
    release: Release,
    agent: Agent,
    progress: Progress = lambda done, total, text: None,
    target: Target | None = None,
) -> Pushed:
    """Bring a release to the device: only what it lacks is sent, and every file is hashed there.

    Args:
        release: The release.
        agent: On the device.
        progress: Told of bytes sent.
        target: Who signs the release; None for nobody.

    Raises:
        StageError: The device has no room or does not take the release, or something arrived damaged.
    """
    device = agent.device
    place = {"root": device.root, "manifest": release.manifest}
    there = agent.ask("inventory", place)
    signature = signing.seal(release.manifest, target, device, there) if target else None
    sent = 0
    if signature or not there["installed"]:
        by_hash = {entry["sha256"]: name for name, entry in release.manifest["files"].items()}
        offsets = {
            digest: _verified(release, by_hash[digest], there["begun"].get(digest)) for digest in there["missing"]
        }
        sizes = {digest: release.manifest["files"][by_hash[digest]]["bytes"] for digest in offsets}
        needed = sum(sizes.values()) - sum(offsets.values())
        if needed > there["free_bytes"]:
            raise StageError(
                f"{device.name} has {there['free_bytes']:,} bytes free and the release needs {needed:,}",
                f"free space below {device.root}; {_prunable(agent)}",
            )
        started = time.monotonic()

        def count(block: int) -> None:
            nonlocal sent
            sent += block
            rate = sent / (time.monotonic() - started)
            left = units.duration((needed - sent) / rate)
            progress(sent, needed, f"bytes sent, {units.size(int(rate))}/s, {left} left")

        for digest, offset in offsets.items():
            if offset < sizes[digest] or digest not in there["begun"]:
                incoming = f"{device.root}/incoming/{digest}"
                if not offset and digest in there["begun"]:
                    device.remove(incoming)  # what is there is something else
                device.upload(release.source(by_hash[digest]), incoming, offset, count)
        agent.ask("install", place | {"signature": signature})
    return Pushed(sent, there["current"], there["previous"], there["damaged"], there["unchecked"])


def _verified(release: Release, name: str, begun: dict[str, Any] | None) -> int:
    """Return how many bytes of a file are on the device already, from a push that broke off."""
    if begun is None or begun["bytes"] > release.manifest["files"][name]["bytes"]:
        return 0
    found = hashlib.sha256()
    left = begun["bytes"]
    with opened(release.source(name)) as file:
        for block in blocks(file):
            found.update(block[:left])
            left -= len(block[:left])
    return int(begun["bytes"]) if found.hexdigest() == begun["sha256"] else 0


def _prunable(agent: Agent) -> str:
    found = agent.ask("prune", {"root": agent.device.root, "keep": 0, "dry_run": True})
    if not found["bytes"]:
        return "no release there can be pruned"
    return f"`toolkit releases prune TARGET --keep 0` would free {found['bytes']:,} bytes"


def probe(release: Release, agent: Agent, images: int) -> NDArray[np.float32] | None:
    """Return what the release computes of its first images on the device, ``(N, ...)``; None if it cannot tell."""
    place = {"root": agent.device.root, "id": release.id, "images": images}
    logits = agent.ask("probe", place)["logits"]
    return None if logits is None else np.array(logits, np.float32)


def bench(
    release: Release, agent: Agent, request: Mapping[str, Any], out: Path, progress: Progress
) -> dict[str, Any]:
    """Have the agent measure the release once; see ``agent/measure.py`` for ``request`` and what is returned.

    The raw files that it names come to ``out``, and ``logits.npy`` where the device could compute them.
    """
    device = agent.device
    with _measured(device, release.id) as folder:
        place = {"root": device.root, "release": f"{device.root}/releases/{release.id}", "out": folder}
        result = agent.ask("bench", {**request, **place}, progress=progress)
        names = [entry["file"] for entry in result["scenarios"]]
        if result["telemetry"]:
            names.append(result["telemetry"])
        if device.exists(f"{folder}/logits.npy"):
            names.append("logits.npy")
        _fetch(device, folder, names, out)
    return result


def compare(
    releases: tuple[str, str], agent: Agent, request: Mapping[str, Any], out: Path, progress: Progress
) -> dict[str, Any]:
    """Have the agent measure two releases in turns, in one process; see ``agent/compare.py`` for ``request``.

    Args:
        releases: Ids of both; both are on the device.
        agent: On the device.
        request: How.
        out: Where ``a.npy``, ``b.npy`` and ``bursts.npy`` come to.
        progress: Told how far it is.
    """
    device = agent.device
    with _measured(device, "-".join(releases)) as folder:
        folders = [f"{device.root}/releases/{release}" for release in releases]
        place = {"root": device.root, "releases": folders, "out": folder}
        result = agent.ask("compare", {**request, **place}, progress=progress)
        _fetch(device, folder, ["a.npy", "b.npy", "bursts.npy"], out)
    return result


@contextlib.contextmanager
def _measured(device: Device, name: str) -> Iterator[str]:
    """Yield a folder on the device for raw files: empty at first, gone afterwards."""
    folder = f"{device.root}/measured/{name}"
    device.remove(folder)
    try:
        yield folder
    finally:
        device.remove(folder)


def _fetch(device: Device, folder: str, names: Sequence[str], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        device.get(f"{folder}/{name}", out / name)
