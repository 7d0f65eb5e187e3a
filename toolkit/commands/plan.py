"""`toolkit plan`: what a run would do; changes nothing."""

from __future__ import annotations

from typing import Any

import click

from toolkit.commands.options import job_from, run_options


@click.command()
@run_options
def plan(**options: Any) -> None:
    """Show what a run for TARGET would do, what is already there, and what it would cost."""
    from toolkit import runs, units
    from toolkit.cli import print_json, tell

    job = job_from(**options)
    planned = runs.plan(job, frozenset(options["rerun"]))
    if options["as_json"]:
        print_json(planned.document)
    else:
        if len(job.target.fleet) > 1:
            click.echo(f"on {planned.document['host']}, the first of {len(job.target.fleet)} hosts")
        for stage in planned.document["stages"]:
            click.echo(f"{stage['name']:<9} {stage['text']}")
        for number, line in enumerate(planned.document["build"]):
            click.echo(f"{'' if number else 'engine':<9} {line}")
        seconds = planned.document["seconds"]
        pending = sum(not stage["cached"] for stage in planned.document["stages"])
        known = "" if planned.document["complete"] else " for the stages that have been run before"
        about = f", about {units.duration(seconds)}{known}" if seconds else ""
        click.echo(f"{pending} stages to run{about}" if pending else "nothing to run")
    if planned.error:
        tell(planned.error)
    raise click.exceptions.Exit(planned.exit_code)
