"""`toolkit trust`: whose releases a device takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.commands.options import build_folder, complete, steal, target_from, wait, where

if TYPE_CHECKING:
    from toolkit.config import Target
    from toolkit.delivery.lease import Claim
    from toolkit.delivery.signing import Trusted


@click.command()
@click.argument("target", shell_complete=complete("targets"))
@click.option(
    "--key",
    "keys",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE.pub",
    help="A public key; the one that signs for TARGET by default.",
)
@click.option("--list", "only_list", is_flag=True, help="Only say who is trusted.")
@where
@wait
@steal
@build_folder
def trust(
    target: str,
    keys: tuple[Path, ...],
    only_list: bool,
    parallel: int,
    wait: float,
    steal: bool,
    build_folder: Path,
    **where: Any,
) -> None:
    """Have TARGET's device take only releases that are signed, with these keys or those that it trusts already."""
    from toolkit.commands import fleets
    from toolkit.delivery.lease import Claim

    chosen, claim = target_from(target, **where), Claim(wait, steal)

    def work(one: Target) -> str:
        return _listed(one, build_folder) if only_list else _trusted(one, keys, claim, build_folder)

    if chosen.fleet:
        fleets.show(fleets.on_each(chosen, parallel, work))
    click.echo(work(chosen))


def _trusted(target: Target, keys: Sequence[Path], claim: Claim, build: Path) -> str:
    from toolkit.console import Console
    from toolkit.delivery import lease, signing, upkeep
    from toolkit.devices import open_device
    from toolkit.devices.agent import Agent

    device = open_device(target.host, target, build)
    agent, console = Agent(device), Console()
    files = keys or (signing.public_half(signing.key_of(target)),)
    with lease.held(device, f"toolkit trust {target.name}", claim, console):
        trusted = signing.trust(agent, files)
    for release in upkeep.listed(agent):
        if release.refused and release.current:
            console.warn(f"{release.refused}; it is current: push it again")
    return _table(trusted)


def _listed(target: Target, build: Path) -> str:
    from toolkit.delivery import signing
    from toolkit.devices import open_device
    from toolkit.devices.agent import Agent

    device = open_device(target.host, target, build)
    return _table(signing.trusted(Agent(device))) or f"{device.name} takes releases of anybody"


def _table(trusted: Sequence[Trusted]) -> str:
    return "\n".join(f"{key.principal}  {key.type} {key.fingerprint}" for key in trusted)
