"""`toolkit doctor`: whether this machine can build, and a device take, what a target asks for."""

from __future__ import annotations

from pathlib import Path

import click

from toolkit.commands.options import build_folder, complete


@click.command()
@click.argument("target", required=False, shell_complete=complete("targets"))
@click.option("--host", help="Where the target is; the target file's host by default.")
@build_folder
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def doctor(target: str | None, host: str | None, build_folder: Path, as_json: bool) -> None:
    """Examine this machine, and the device that TARGET names; exits with 1 when something is missing."""
    from toolkit import doctor as examinations
    from toolkit import files
    from toolkit.checks import Check, failed
    from toolkit.cli import print_json
    from toolkit.commands.checklist import show
    from toolkit.devices import open_device
    from toolkit.errors import StageError, UsageError

    if target is None and host is not None:
        raise UsageError(
            "--host names where a target is, and none is named", f"toolkit doctor TARGET --host {host}"
        )
    chosen = files.load_target(target) if target else None
    if chosen is not None and host is not None:
        chosen = chosen.model_copy(update={"host": host})
    checks = examinations.examine_host(build_folder, chosen)
    name, found, seen = "", None, list[Check]()
    if chosen is not None:
        name = chosen.host or "this machine"
        try:
            device = open_device(chosen.host, chosen, build_folder)
        except StageError as error:
            seen = [Check("reach", "fail", error.message, error.hint)]
        else:
            name = device.name
            found, seen = examinations.examine_device(device, chosen)
    if as_json:
        device_document = {
            "name": name,
            "facts": vars(found) if found else None,
            "checks": [vars(check) for check in seen],
        }
        print_json({
            "target": target,
            "host": {"checks": [vars(check) for check in checks]},
            "device": device_document if chosen else None,
        })  # fmt: skip
    else:
        click.echo("this machine")
        show(checks)
        if chosen is not None:
            click.echo(f"\n{chosen.name}, on {name}")
            show(seen)
    raise click.exceptions.Exit(1 if failed(checks + seen) else 0)
