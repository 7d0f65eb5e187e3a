"""`toolkit provision`: a device gets the runtime, without root and without internet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.commands.options import build_folder, complete, steal, target_from, wait, where

if TYPE_CHECKING:
    from toolkit.config import Target
    from toolkit.delivery.lease import Claim


@click.command()
@click.argument("target", shell_complete=complete("targets"))
@click.option(
    "--wheels",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Take the wheels from this folder; nothing is downloaded.",
)
@where
@wait
@steal
@build_folder
def provision(
    target: str,
    wheels: Path | None,
    parallel: int,
    wait: float,
    steal: bool,
    build_folder: Path,
    **where: Any,
) -> None:
    """Give TARGET's device NumPy, Pillow and the runtime.

    The wheels for its Python are downloaded here and installed there, in a virtual environment below the release
    root: it needs no root and no internet. TensorRT itself is the system's. The same command again changes nothing.
    """
    from toolkit.commands import fleets
    from toolkit.delivery.lease import Claim

    chosen, claim = target_from(target, **where), Claim(wait, steal)
    if chosen.fleet:
        fleets.show(fleets.on_each(chosen, parallel, lambda one: _provisioned(one, wheels, claim, build_folder)))
    click.echo(_provisioned(chosen, wheels, claim, build_folder))


def _provisioned(target: Target, wheels: Path | None, claim: Claim, build: Path) -> str:
    from toolkit.console import Console
    from toolkit.delivery import lease
    from toolkit.delivery import provision as delivery
    from toolkit.devices import open_device

    if target.host in (None, "local"):
        return "this machine runs the toolkit's own Python: there is nothing to provision"
    device, console = open_device(target.host, target, build), Console()
    with console.progress("provision") as progress:
        progress(0, 0, "looking for wheels")
        order = delivery.choose(device, target, build / "wheels", wheels)
    holding = lease.held(device, f"toolkit provision {target.name}", claim, console)
    with holding, console.progress("provision") as progress:
        changed = delivery.provision(device, order, progress)
    verb = "provisioned" if changed else "is provisioned already:"
    return f"{device.name} {verb} {', '.join(order.packages)}"
