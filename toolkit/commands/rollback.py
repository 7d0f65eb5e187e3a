"""`toolkit rollback`: back to a release that is on the device already."""

from __future__ import annotations

from pathlib import Path

import click

from toolkit.commands.options import build_folder, complete, host, steal, target_from, wait


@click.command()
@click.argument("target", shell_complete=complete("targets"))
@click.option("--to", metavar="ID", help="The release, or how its id begins; the previous one by default.")
@host
@wait
@steal
@build_folder
def rollback(target: str, to: str | None, host: str | None, wait: float, steal: bool, build_folder: Path) -> None:
    """Make another release on TARGET's device current; one that does not run there is not left so."""
    from toolkit.console import Console
    from toolkit.delivery import lease, upkeep
    from toolkit.devices import open_device
    from toolkit.devices.agent import Agent
    from toolkit.engines import places

    chosen = target_from(target, host)
    device = open_device(chosen.host, chosen, build_folder)
    release = upkeep.choose(upkeep.listed(Agent(device)), to, device.name)
    if release.current:
        click.echo(f"release {release.id} is current already")
        return
    place = places.native_or_contained(target_from(target, host, release.runtime), device, "the release runs there")
    place.prepare(Console().say)
    with lease.held(place.device, f"toolkit rollback {target}", lease.Claim(wait, steal), Console()):
        before = upkeep.activate(release.id, Agent(place.device))["previous"]
    click.echo(f"release {release.id} is current and runs" + (f"; {before} is previous" if before else ""))
