"""Two releases measured in turns on one device, in several processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from toolkit.bench import comparison
from toolkit.delivery import release as delivery
from toolkit.devices.agent import Agent
from toolkit.store import Work


def compare(
    work: Work,
    releases: tuple[str, str],
    agent: Agent,
    request: Mapping[str, Any],
    time_limit: float,
    undecided: Callable[[Mapping[str, Any]], bool],
) -> dict[str, Any]:
    """Measure two releases in turns; in further processes as long as that leaves a clause undecided.

    Args:
        work: Raw files go to ``process-K/`` in its ``out``.
        releases: Ids; both are on the device.
        agent: On the device.
        request: ``tuning``, ``warmup_ms`` and ``period_ms``, as the agent takes them.
        time_limit: Milliseconds after which no further process is begun.
        undecided: Whether what is known so far decides nothing yet.

    Returns:
        What :func:`comparison.compare` says of the second release, beside ``release`` and ``against``: its id, and
        the other's.
    """
    begun = time.monotonic()
    against, release = releases
    folders: list[Path] = []
    while True:
        folder = work.out / f"process-{len(folders)}"
        asked = {"duration_ms": comparison.DURATION_MS, "seed": len(folders), **request}
        delivery.compare(releases, agent, asked, folder, work.progress)
        folders.append(folder)
        if len(folders) >= comparison.PROCESSES:
            found = comparison.compare(folders)
            if not undecided(found) or 1000 * (time.monotonic() - begun) > time_limit:
                return found | {"release": release, "against": against}
