"""`toolkit gc`: list and remove what no recent run refers to."""

from __future__ import annotations

from pathlib import Path

import click

from toolkit.commands.options import build_folder


@click.command()
@click.option(
    "--keep", type=click.IntRange(0), default=5, show_default=True, help="Runs and sweeps whose artifacts stay."
)
@click.option("--remove", is_flag=True, help="Remove what is listed.")
@build_folder
def gc(keep: int, remove: bool, build_folder: Path) -> None:
    """List (or remove) the artifacts that none of the last runs and sweeps refers to."""
    from toolkit import garbage, units

    found = garbage.collect(build_folder, keep, remove=remove)
    for path, size in found:
        click.echo(f"{units.size(size):>10}  {path}")
    total = units.size(sum(size for _, size in found))
    verb = "removed" if remove else "can be removed (--remove)"
    click.echo(f"{len(found)} folders, {total} {verb}" if found else "nothing to remove")
