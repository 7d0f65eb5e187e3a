"""`toolkit releases`: what is on a device, and the removal of what is old."""

from __future__ import annotations

import contextlib
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.commands.options import build_folder, complete, steal, target_from, wait, where

if TYPE_CHECKING:
    from toolkit.config import Target
    from toolkit.delivery.lease import Claim
    from toolkit.delivery.upkeep import Installed
    from toolkit.devices import Device


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
@where
@build_folder
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def listed(target: str, parallel: int, build_folder: Path, as_json: bool, **where: Any) -> None:
    """List the releases on TARGET's device, newest first.

    Every file is hashed there, and those that are not what they should be are named.
    """
    from toolkit.cli import print_json
    from toolkit.commands import fleets

    chosen = target_from(target, **where)
    if chosen.fleet and as_json:
        found = fleets.on_each(chosen, parallel, lambda one: _document(one, build_folder))
        print_json({"devices": fleets.as_json(found)})
        fleets.leave(found)
    elif chosen.fleet:
        fleets.show(fleets.on_each(chosen, parallel, lambda one: _table(one, build_folder)))
    elif as_json:
        print_json(_document(chosen, build_folder))
    else:
        click.echo(_table(chosen, build_folder))


def _releases_on(target: Target, build: Path) -> tuple[Device, list[Installed], str | None]:
    """Return a target's device, the releases there, and who is at work on it."""
    from toolkit.delivery import lease, upkeep
    from toolkit.devices import open_device
    from toolkit.devices.agent import Agent

    device = open_device(target.host, target, build)
    return device, upkeep.listed(Agent(device)), lease.holder(Agent(device))


def _document(target: Target, build: Path) -> dict[str, Any]:
    device, found, holder = _releases_on(target, build)
    entries = [_as_json(entry) for entry in found]
    return {"device": device.name, "root": device.root, "holder": holder, "releases": entries}


def _table(target: Target, build: Path) -> str:
    device, found, holder = _releases_on(target, build)
    lines = [_line(entry) for entry in found] or [f"no release on {device.name} below {device.root}"]
    if holder:
        lines.append(f"at work there: {holder}")
    return "\n".join(lines)


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
@where
@wait
@steal
@build_folder
def prune(
    target: str,
    keep: int,
    dry_run: bool,
    parallel: int,
    wait: float,
    steal: bool,
    build_folder: Path,
    **where: Any,
) -> None:
    """Remove all but the newest releases from TARGET's device.

    The current and the previous one always stay. With the others goes the content that no release shares, and what
    broken-off pushes, builds and benchmarks left more than a day ago.
    """
    from toolkit.commands import fleets
    from toolkit.delivery.lease import Claim

    chosen, claim = target_from(target, **where), Claim(wait, steal)
    if chosen.fleet:
        fleets.show(fleets.on_each(chosen, parallel, lambda one: _pruned(one, keep, dry_run, claim, build_folder)))
    click.echo(_pruned(chosen, keep, dry_run, claim, build_folder))


def _pruned(target: Target, keep: int, dry_run: bool, claim: Claim, build: Path) -> str:
    from toolkit import units
    from toolkit.console import Console
    from toolkit.delivery import lease, upkeep
    from toolkit.devices import open_device
    from toolkit.devices.agent import Agent

    device = open_device(target.host, target, build)
    with contextlib.ExitStack() as until_pruned:
        if not dry_run:
            until_pruned.enter_context(
                lease.held(device, f"toolkit releases prune {target.name}", claim, Console())
            )
        pruned = upkeep.prune(Agent(device), keep, dry_run=dry_run)
    lines = [*(f"releases/{release}" for release in pruned.releases), *pruned.leftovers]
    if pruned.contents:
        lines.append(f"{pruned.contents} files of the store that no release shares")
    if not lines:
        return f"nothing to remove on {device.name}"
    return "\n".join([*lines, f"{units.size(pruned.bytes)} {'would be freed' if dry_run else 'freed'}"])
