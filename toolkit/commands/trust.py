"""`toolkit trust`: whose releases a device takes."""

from __future__ import annotations

from pathlib import Path

import click

from toolkit.commands.options import build_folder, complete, host, steal, target_from, wait


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
@host
@wait
@steal
@build_folder
def trust(
    target: str,
    keys: tuple[Path, ...],
    only_list: bool,
    host: str | None,
    wait: float,
    steal: bool,
    build_folder: Path,
) -> None:
    """Have TARGET's device take only releases that are signed, with these keys or those that it trusts already."""
    from toolkit.console import Console
    from toolkit.delivery import lease, signing, upkeep
    from toolkit.devices import open_device
    from toolkit.devices.agent import Agent

    chosen = target_from(target, host)
    device = open_device(chosen.host, chosen, build_folder)
    agent = Agent(device)
    if only_list:
        trusted = signing.trusted(agent)
    else:
        files = keys or (signing.public_half(signing.key_of(chosen)),)
        with lease.held(device, f"toolkit trust {target}", lease.Claim(wait, steal), Console()):
            trusted = signing.trust(agent, files)
        for release in upkeep.listed(agent):
            if release.refused and release.current:
                Console().warn(f"{release.refused}; it is current: push it again")
    for key in trusted:
        click.echo(f"{key.principal}  {key.type} {key.fingerprint}")
    if not trusted:
        click.echo(f"{device.name} takes releases of anybody")
