"""`toolkit init`: a starter that runs as it stands."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=".")
def init(folder: Path) -> None:
    """Write a target, a profile, a model file and an image folder's layout into FOLDER."""
    from toolkit import starter

    for path in starter.write(folder):
        click.echo(f"wrote {path}")
    click.echo("try it:  toolkit run my-device --model my_model:build --data imagefolder:images")
