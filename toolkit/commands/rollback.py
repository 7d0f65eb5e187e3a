"""`toolkit rollback`: back to a release that is on the device already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.commands.options import build_folder, complete, steal, target_from, wait, where, with_runtime

if TYPE_CHECKING:
    from toolkit.config import Target
    from toolkit.delivery.lease import Claim


@click.command()
@click.argument("target", shell_complete=complete("targets"))
@click.option("--to", metavar="ID", help="The release, or how its id begins; the previous one by default.")
@where
@wait
@steal
@build_folder
def rollback(
    target: str, to: str | None, parallel: int, wait: float, steal: bool, build_folder: Path, **where: Any
) -> None:
    """Make another release on TARGET's device current; one that does not run there is not left so."""
    from toolkit.commands import fleets
    from toolkit.delivery.lease import Claim

    chosen, claim = target_from(target, **where), Claim(wait, steal)
    if chosen.fleet:
        fleets.show(fleets.on_each(chosen, parallel, lambda one: _back(one, to, claim, build_folder)))
    click.echo(_back(chosen, to, claim, build_folder))


def _back(target: Target, to: str | None, claim: Claim, build: Path) -> str:
    from toolkit.console import Console
    from toolkit.delivery import lease, upkeep
    from toolkit.devices import open_device
    from toolkit.devices.agent import Agent
    from toolkit.engines import places

    device = open_device(target.host, target, build)
    release = upkeep.choose(upkeep.listed(Agent(device)), to, device.name)
    if release.current:
        return f"release {release.id} is current already"
    built_for = with_runtime(target, str(release.runtime))
    place = places.native_or_contained(built_for, device, "the release runs there")
    place.prepare(Console().say)
    with lease.held(place.device, f"toolkit rollback {target.name}", claim, Console()):
        before = upkeep.activate(release.id, Agent(place.device))["previous"]
    return f"release {release.id} is current and runs" + (f"; {before} is previous" if before else "")
