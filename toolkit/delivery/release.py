"""Releases: engine, agent and evaluation data with a manifest; pushed, verified on the device, switched."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import __version__
from toolkit.agent.releases import identity
from toolkit.devices.agent import Agent, pack
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


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    sent_bytes: int
    current: str | None
    previous: str | None
    repaired: list[str]


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
        "format": 1,
        "toolkit": __version__,
        "files": dict(sorted(files.items())),
        "engine": {key: value for key, value in engine.meta.items() if key != "bytes"},
        "model": {"classes": data.meta["classes"], "input": ["uint8", 3, *[data.meta["input_size"]] * 2]},
        "fast": fast,
        **about,
    }
    return Release(manifest | {"id": identity(manifest)}, sources, content)


def push(release: Release, agent: Agent, progress: Progress = lambda done, total, text: None) -> Pushed:
    """Bring a release to the device: only what it lacks is sent, and every file is hashed there.

    Raises:
        StageError: The device has no room, or something arrived damaged.
    """
    device = agent.device
    place = {"root": device.root, "manifest": release.manifest}
    there = agent.ask("inventory", place)
    sent = 0
    if not there["installed"]:
        by_hash = {entry["sha256"]: name for name, entry in release.manifest["files"].items()}
        wanted = [by_hash[digest] for digest in there["missing"]]
        needed = sum(release.manifest["files"][name]["bytes"] for name in wanted)
        if needed > there["free_bytes"]:
            raise StageError(
                f"{device.name} has {there['free_bytes']:,} bytes free and the release needs {needed:,}",
                f"free space below {device.root}; {_prunable(agent)}",
            )
        for name in wanted:
            entry = release.manifest["files"][name]
            source = release.sources.get(name) or release.content[name]
            device.put(source, f"{device.root}/incoming/{entry['sha256']}")
            sent += entry["bytes"]
            progress(sent, needed, "bytes sent")
        agent.ask("install", place)
    return Pushed(sent, there["current"], there["previous"], there["damaged"])


def _prunable(agent: Agent) -> str:
    found = agent.ask("prune", {"root": agent.device.root, "keep": 0, "dry_run": True})
    if not found["bytes"]:
        return "no release there can be pruned"
    return f"`toolkit releases prune TARGET --keep 0` would free {found['bytes']:,} bytes"


def bench(
    release: Release, agent: Agent, settings: dict[str, Any], out: Path, progress: Progress
) -> dict[str, Any]:
    """Have the agent measure the release; raw data come back as ``latencies.npy`` and ``logits.npy``."""
    device = agent.device
    folder = f"{device.root}/measured/{release.id}"
    try:
        request = {
            "root": device.root,
            "release": f"{device.root}/releases/{release.id}",
            "out": folder,
            **settings,
        }
        result = agent.ask("bench", request, progress=progress)
        for name in ("latencies.npy", "logits.npy"):
            if device.exists(f"{folder}/{name}"):
                device.get(f"{folder}/{name}", out / name)
    finally:
        device.remove(folder)
    return result
