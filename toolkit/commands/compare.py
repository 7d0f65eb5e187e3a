"""`toolkit compare`: two engines in turns on the same device."""

from __future__ import annotations

from typing import Any

import click

from toolkit.commands.options import job_from, run_options


@click.command()
@run_options
@click.option(
    "--against",
    default="current",
    show_default=True,
    metavar="RELEASE",
    help="current, baseline (the unpruned network in fp32), or how a release's id begins.",
)
def compare(against: str, **options: Any) -> None:
    """Measure TARGET's engine in turns with another one on its device; nothing is committed.

    Says how much higher or lower its latency is, with an interval, or that there is no significant difference.
    """
    from toolkit import runs
    from toolkit.cli import print_json
    from toolkit.console import Console

    job = job_from(**options)
    found = runs.compare(job, against, Console(quiet=options["quiet"]), frozenset(options["rerun"]))
    if options["as_json"]:
        print_json(found)
    else:
        click.echo(f"release {found['release']} beside {found['against']}: {found['sentence']}")
