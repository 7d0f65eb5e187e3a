"""`toolkit provision`: a device gets the runtime, without root and without internet."""

from __future__ import annotations

from pathlib import Path

import click

from toolkit.commands.options import build_folder, complete, host, steal, target_from, wait


@click.command()
@click.argument("target", shell_complete=complete("targets"))
@click.option(
    "--wheels",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Take the wheels from this folder; nothing is downloaded.",
)
@host
@wait
@steal
@build_folder
def provision(
    target: str, wheels: Path | None, host: str | None, wait: float, steal: bool, build_folder: Path
) -> None:
    """Give TARGET's device NumPy, Pillow and the runtime.

    The wheels for its Python are downloaded here and installed there, in a virtual environment below the release
    root: it needs no root and no internet. TensorRT itself is the system's. The same command again changes nothing.
    """
    from toolkit.console import Console
    from toolkit.delivery import lease
    from toolkit.delivery import provision as delivery
    from toolkit.devices import open_device

    chosen = target_from(target, host)
    if chosen.host in (None, "local"):
        click.echo("this machine runs the toolkit's own Python: there is nothing to provision")
        return
    device = open_device(chosen.host, chosen, build_folder)
    console = Console()
    holding = lease.held(device, f"toolkit provision {target}", lease.Claim(wait, steal), console)
    with holding, console.progress("provision") as progress:
        done = delivery.provision(device, chosen, build_folder / "wheels", wheels, progress)
    verb = "provisioned" if done.changed else "is provisioned already:"
    click.echo(f"{device.name} {verb} {', '.join(done.packages)}")
