"""`toolkit doctor`: whether this machine can build, and a device take, what a target asks for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from toolkit.commands.options import build_folder, complete, target_from, where

if TYPE_CHECKING:
    from toolkit.checks import Check
    from toolkit.config import Target
    from toolkit.devices.probe import Probe
    from toolkit.errors import ToolkitError


class _Examined(NamedTuple):
    name: str
    facts: Probe | None
    checks: list[Check]

    def as_json(self) -> dict[str, Any]:
        facts = vars(self.facts) if self.facts else None
        return {"name": self.name, "facts": facts, "checks": [vars(check) for check in self.checks]}


@click.command()
@click.argument("target", required=False, shell_complete=complete("targets"))
@where
@build_folder
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def doctor(target: str | None, parallel: int, build_folder: Path, as_json: bool, **where: Any) -> None:
    """Examine this machine, and the device that TARGET names; exits with 1 when something is missing."""
    from toolkit import doctor as examinations
    from toolkit.checks import failed
    from toolkit.cli import print_json
    from toolkit.commands import fleets
    from toolkit.commands.checklist import show
    from toolkit.errors import StageError, ToolkitError, UsageError

    if target is None and any(where.values()):
        name, value = next((name.replace("_", "-"), value) for name, value in where.items() if value)
        given = f"--{name}" if value is True else f"--{name} {value}"
        raise UsageError(
            f"--{name} is about where a target is, and none is named", f"toolkit doctor TARGET {given}"
        )
    chosen = target_from(target, **where) if target else None
    checks = examinations.examine_host(build_folder, chosen)
    devices: list[_Examined] = []
    if chosen is not None and chosen.fleet:
        found = fleets.on_each(chosen, parallel, lambda one: _examine(one, build_folder))
        devices = [
            _unreachable(host, result) if isinstance(result, ToolkitError) else result
            for host, result in found.items()
        ]
    elif chosen is not None:
        try:
            devices = [_examine(chosen, build_folder)]
        except StageError as error:
            devices = [_unreachable(chosen.host or "this machine", error)]
    if as_json:
        documents = [device.as_json() for device in devices]
        several = chosen is not None and bool(chosen.fleet)
        told = {"devices": documents} if several else {"device": documents[0] if documents else None}
        print_json({"target": target, "host": {"checks": [vars(check) for check in checks]}, **told})
    else:
        click.echo("this machine")
        show(checks)
        for device in devices:
            click.echo(f"\n{target}, on {device.name}")
            show(device.checks)
    raise click.exceptions.Exit(1 if failed([*checks, *(c for device in devices for c in device.checks)]) else 0)


def _examine(target: Target, build: Path) -> _Examined:
    from toolkit import doctor as examinations
    from toolkit.devices import open_device

    device = open_device(target.host, target, build)
    return _Examined(device.name, *examinations.examine_device(device, target))


def _unreachable(host: str, error: ToolkitError) -> _Examined:
    from toolkit.checks import Check

    return _Examined(host, None, [Check("reach", "fail", error.message, error.hint)])
