"""`toolkit run`, and a verb for each stage that goes up to and with it."""

from __future__ import annotations

import sys
from typing import Any

import click

from toolkit.commands.options import in_container, job_from, run_options


def _go(until: str, options: dict[str, Any]) -> None:
    from toolkit import runs
    from toolkit.cli import print_json, tell
    from toolkit.console import Console
    from toolkit.report import terminal

    console = Console(quiet=options["quiet"])
    job = job_from(**options)
    if options["in_container"]:
        from toolkit.containers.inside import run_inside

        arguments = [argument for argument in sys.argv[1:] if argument != "--in-container"]
        raise click.exceptions.Exit(run_inside(arguments, job, console.say))
    outcome = runs.execute(
        job, until, console, frozenset(options["rerun"]), options["parallel"], options.get("waves")
    )
    if options["as_json"]:
        print_json(outcome.document)
    elif text := terminal.summary(outcome.document):
        click.echo(text)
    if outcome.error:
        tell(outcome.error)
    raise click.exceptions.Exit(outcome.exit_code)


@click.command()
@run_options
@click.option(
    "--waves", metavar="SIZES", help="Reach a fleet in waves, as 1,10%,100%; a wave that fails is rolled back."
)
@in_container
def run(**options: Any) -> None:
    """Do the whole job for TARGET: from training to a committed release."""
    _go("commit", options)


def _verb(stage: str, what: str) -> click.Command:
    @click.command(stage, help=f"{what} for TARGET; reuses what is there.")
    @run_options
    @in_container
    def verb(**options: Any) -> None:
        _go(stage, options)

    return verb


train = _verb("train", "Train the unpruned network")
prune = _verb("prune", "Go up to pruning")
finetune = _verb("finetune", "Go up to fine-tuning the pruned network")
export = _verb("export", "Go up to the ONNX file")
quantize = _verb("quantize", "Go up to the graph in the profile's precision")
build = _verb("build", "Go up to the engine")
push = _verb("push", "Go up to the release on the device, not current yet")
bench = _verb("bench", "Go up to the measurement on the device")
report = _verb("report", "Go up to verdict and page, without making the release current")
