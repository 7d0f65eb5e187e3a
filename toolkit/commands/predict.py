"""`toolkit predict`: what the release on a device says of images."""

from __future__ import annotations

from pathlib import Path

import click

from toolkit.commands.options import build_folder, complete, host, target_from, with_runtime


@click.command()
@click.argument("target", shell_complete=complete("targets"))
@click.argument("images", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False), metavar="IMAGE...")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="How many classes to print.")
@host
@build_folder
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def predict(
    target: str, images: tuple[str, ...], top: int, host: str | None, build_folder: Path, as_json: bool
) -> None:
    """Run the current release on TARGET's device over images, and print their likeliest classes."""
    from toolkit.agent.predict import told
    from toolkit.agent.protocol import Refusal
    from toolkit.console import Console
    from toolkit.delivery import predict as delivery
    from toolkit.devices import open_device
    from toolkit.devices.agent import Agent
    from toolkit.engines import places
    from toolkit.errors import StageError, UsageError

    chosen = target_from(target, host)
    if chosen.fleet:
        raise UsageError(f"'{target}' is a fleet", f"name one of its devices: --host {chosen.fleet[0]}")
    device = open_device(chosen.host, chosen, build_folder)
    manifest = delivery.current(Agent(device), target)
    batch = delivery.read(images, manifest)
    built_for = with_runtime(chosen, manifest["engine"]["runtime"])
    place = places.native_or_contained(built_for, device, "the release runs there")
    place.prepare(Console().say)
    answer = delivery.answer(batch, manifest["id"], Agent(place.device))
    try:
        click.echo(told(images, answer, top, as_json=as_json))
    except Refusal as problem:
        raise StageError(problem.message, problem.hint) from problem
