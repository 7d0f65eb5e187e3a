"""`toolkit releases`: what is on a device, and the removal of what is old."""

from __future__ import annotations

import contextlib
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolkit.commands.options import build_folder, complete, host, steal, target_from, wait

if TYPE_CHECKING:
    from toolkit.delivery.upkeep import Installed


class _Releases(click.Group):
    """Takes what is no subcommand for the target to list."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Releases, subcommand_metavar="TARGET | COMMAND [ARGS]...")
def releases() -> None:
    """List the releases on TARGET's device, or remove old ones."""


@releases.command("list")
@click.argument("target", shell_complete=complete("targets"))
@host
@build_folder
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def listed(target: str, host: str | None, build_folder: Path, as_json: bool) -> None:
    """List the releases on TARGET's device, newest first.

    Every file is hashed there, and those that are not what they should be are named.
    """
    from toolkit.cli import print_json
    from toolkit.delivery import lease, upkeep
    from toolkit.devices import open_device
    from toolkit.devices.agent import Agent

    chosen = target_from(target, host)
    device = open_device(chosen.host, chosen, build_folder)
    agent = Agent(device)
    found = upkeep.listed(agent)
    holder = lease.holder(agent)
    if as_json:
        entries = [_as_json(entry) for entry in found]
        print_json({"device": device.name, "root": device.root, "holder": holder, "releases": entries})
        return
    for entry in found:
        click.echo(_line(entry))
    if not found:
        click.echo(f"no release on {device.name} below {device.root}")
    if holder:
        click.echo(f"at work there: {holder}")


def _as_json(entry: Installed) -> dict[str, object]:
    moment = datetime.fromtimestamp(entry.installed, timezone.utc).isoformat(timespec="seconds")
    return vars(entry) | {"installed": moment}


def _line(entry: Installed) -> str:
    from toolkit import units

    mark = "current" if entry.current else "previous" if entry.previous else ""
    moment = datetime.fromtimestamp(entry.installed).astimezone()
    words = [f"{entry.id}  {mark:<8}  {moment:%Y-%m-%d %H:%M}  {units.size(entry.bytes):>8} "]
    if entry.model is not None:
        words.append(f"{entry.model} for {entry.profile}, {entry.runtime} {entry.precision}")
    if entry.fast:
        words.append("(fast run)")
    if entry.refused:
        words.append(click.style(f"REFUSED: {entry.refused}", fg="red"))
    else:
        words.append(f"signed by {entry.signed_by}" if entry.signed_by else "unsigned")
    if entry.damaged:
        words.append(click.style(f"DAMAGED: {', '.join(entry.damaged)}", fg="red"))
    return " ".join(words)


@releases.command()
@click.argument("target", shell_complete=complete("targets"))
@click.option("--keep", type=click.IntRange(0), required=True, help="How many of the newest releases stay.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@host
@wait
@steal
@build_folder
def prune(
    target: str, keep: int, dry_run: bool, host: str | None, wait: float, steal: bool, build_folder: Path
) -> None:
    """Remove all but the newest releases from TARGET's device.

    The current and the previous one always stay. With the others goes the content that no release shares, and what
    broken-off pushes, builds and benchmarks left more than a day ago.
    """
    from toolkit import units
    from toolkit.console import Console
    from toolkit.delivery import lease, upkeep
    from toolkit.devices import open_device
    from toolkit.devices.agent import Agent

    chosen = target_from(target, host)
    device = open_device(chosen.host, chosen, build_folder)
    with contextlib.ExitStack() as until_pruned:
        if not dry_run:
            doing = f"toolkit releases prune {target}"
            until_pruned.enter_context(lease.held(device, doing, lease.Claim(wait, steal), Console()))
        pruned = upkeep.prune(Agent(device), keep, dry_run=dry_run)
    for name in [*(f"releases/{release}" for release in pruned.releases), *pruned.leftovers]:
        click.echo(name)
    if pruned.contents:
        click.echo(f"{pruned.contents} files of the store that no release shares")
    verb = "would be freed" if dry_run else "freed"
    nothing = not (pruned.releases or pruned.leftovers or pruned.contents)
    click.echo(f"nothing to remove on {device.name}" if nothing else f"{units.size(pruned.bytes)} {verb}")
