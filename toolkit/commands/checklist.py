"""How a doctor's checks are printed."""

from __future__ import annotations

import click

from toolkit.checks import Check

_COLORS = {"pass": "green", "warn": "yellow", "fail": "red"}


def show(checks: list[Check]) -> None:
    """Print a line for each check, and its remedy below."""
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        click.echo(f"{click.style(check.status, fg=_COLORS[check.status])}  {check.name:<{width}}  {check.text}")
        if check.hint:
            click.echo(f"      {click.style('hint:', fg='cyan')} {check.hint}")
