"""The releases on a device: listed, switched between with a health check, pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolkit import units
from toolkit.devices.agent import Agent
from toolkit.errors import StageError, UsageError


@dataclass(frozen=True)
class Installed:
    """A release on a device.

    Attributes:
        id: Its name.
        installed: When, in seconds since 1970 by the device's clock.
        bytes: What its files take, shared ones included.
        damaged: Names of files that are not what the manifest says.
        signed_by: Who signed it; where the device trusts nobody by name, the key.
        refused: Why the device does not take its signature, or the lack of one.
        model: As ``--model`` was given; this and the following are None where the manifest is damaged.
        data: Kind of the data set.
        profile: Profile that it was made for.
        runtime: Runtime of its engine.
        precision: Precision of its engine.
        fast: Whether it comes from a fast run.
        current: Whether the device runs it.
        previous: Whether a rollback goes to it.
    """

    id: str
    installed: float
    bytes: int
    damaged: list[str]
    signed_by: str | None
    refused: str | None
    model: str | None
    data: str | None
    profile: str | None
    runtime: str | None
    precision: str | None
    fast: bool | None
    current: bool
    previous: bool


@dataclass(frozen=True)
class Pruned:
    """What was removed from a device, or would be.

    Attributes:
        releases: Ids.
        contents: How many files of the store.
        leftovers: What broken-off work had left, as paths below the root.
        bytes: Space that all of it took.
    """

    releases: list[str]
    contents: int
    leftovers: list[str]
    bytes: int


class UnhealthyError(StageError):
    """A release does not run, and what was current before the switch to it is so again.

    Attributes:
        current: The release that is current.
        previous: The one before.
    """

    def __init__(self, message: str, hint: str | None, current: str | None, previous: str | None) -> None:
        super().__init__(message, hint)
        self.current = current
        self.previous = previous


def listed(agent: Agent) -> list[Installed]:
    """Return the releases on a device, the newest first; every file is hashed there."""
    found = agent.ask("releases", {"root": agent.device.root})
    return [
        Installed(**entry, current=entry["id"] == found["current"], previous=entry["id"] == found["previous"])
        for entry in found["releases"]
    ]


def choose(releases: Sequence[Installed], wanted: str | None, where: str) -> Installed:
    """Return the release to go back to.

    Args:
        releases: Those on the device.
        wanted: An id or how one begins; None for the previous one.
        where: The device's name, for messages.

    Raises:
        UsageError: No release, or more than one, is meant.
        StageError: There is no previous release, or the one that is meant is damaged.
    """
    if wanted is None:
        found = [release for release in releases if release.previous and not release.current]
        if not found:
            raise StageError(
                f"there is no previous release on {where}",
                "choose one with --to; `toolkit releases TARGET` lists them",
            )
    else:
        found = [release for release in releases if release.id.startswith(wanted)]
        if not found:
            ids = [release.id for release in releases]
            raise UsageError(f"no release on {where} is called '{wanted}'", units.nearest(wanted, ids))
        if len(found) > 1:
            ids = [release.id for release in found]
            raise UsageError(f"'{wanted}' is the beginning of {len(ids)} releases on {where}", ", ".join(ids))
    (release,) = found
    if release.damaged:
        raise StageError(
            f"release {release.id} on {where} is damaged: {', '.join(release.damaged)}",
            "the run that made it mends it; or choose another with --to",
        )
    return release


def named(releases: Sequence[Installed], name: str, where: str) -> Installed:
    """Return the release that ``current`` or the beginning of an id means; raises like :func:`choose`."""
    if name != "current":
        return choose(releases, name, where)
    for release in releases:
        if release.current:
            return release
    raise StageError(f"no release is current on {where}", "`toolkit run TARGET` makes one current")


def activate(release_id: str, agent: Agent) -> dict[str, Any]:
    """Make a release current, and see that it runs; returns ``current`` and ``previous``.

    Raises:
        UnhealthyError: It does not run; ``current`` and ``previous`` are what they were.
        StageError: The release is not whole; or it does not run, and what was current cannot be so again.
    """
    found = agent.ask("activate", {"root": agent.device.root, "id": release_id})
    if problem := found["problem"]:
        current = found["current"]
        state = f"release {current} is current again" if current else "no release is current, as before"
        message = f"release {release_id} does not run ({problem['message']}); {state}"
        raise UnhealthyError(message, problem["hint"], current, found["previous"])
    return found


def prune(agent: Agent, keep: int, *, dry_run: bool = False) -> Pruned:
    """Remove all but the newest ``keep`` releases from a device; ``current`` and ``previous`` always stay."""
    return Pruned(**agent.ask("prune", {"root": agent.device.root, "keep": keep, "dry_run": dry_run}))
