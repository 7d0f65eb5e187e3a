"""`toolkit run`, and a verb for each stage that goes up to and with it."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import click
from click.core import ParameterSource

from toolkit.commands.options import github, in_container, job_from, junit, run_options


def _go(until: str, options: dict[str, Any], goal: str | None = None) -> None:
    from toolkit import runs
    from toolkit.cli import print_json, tell
    from toolkit.console import Console
    from toolkit.errors import StageError
    from toolkit.report import ci, terminal

    console = Console(quiet=options["quiet"])
    job = replace(job_from(**options), until_contract=goal == "contract")
    if options["in_container"]:
        from toolkit.containers.inside import run_inside

        arguments = [argument for argument in sys.argv[1:] if argument != "--in-container"]
        raise click.exceptions.Exit(run_inside(arguments, job, console.say))
    rerun = frozenset(options["rerun"])
    if goal == "latency":
        from toolkit import bisection

        outcome = bisection.largest(job, console, rerun)
    else:
        outcome = runs.execute(job, until, console, rerun, options["parallel"], options.get("waves"))
    if options["as_json"]:
        print_json(outcome.document)
    elif text := terminal.summary(outcome.document, outcome.picture):
        click.echo(text)
        if outcome.exit_code == 1:
            from toolkit.report import recorded

            if said := recorded.nearest(job.build, outcome.document):
                click.echo(f"accuracy  {said}")
    if outcome.error:
        tell(outcome.error)
    if options["github"] and (text := ci.github(outcome.document)):
        click.echo(text, err=True)  # GitHub reads both streams, and stdout is for data
    if file := options["junit"]:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(ci.junit(outcome.document), encoding="utf-8")
        except OSError as error:
            raise StageError(
                f"{file} cannot be written: {error.strerror}", "give --junit a file that can be"
            ) from error
    raise click.exceptions.Exit(outcome.exit_code)


@click.command()
@run_options
@click.option(
    "--waves", metavar="SIZES", help="Reach a fleet in waves, as 1,10%,100%; a wave that fails is rolled back."
)
@click.option(
    "--until",
    type=click.Choice(["contract", "latency"]),
    help="contract: end fine-tuning when its accuracy suffices; latency: find the largest budget that keeps it.",
)
@junit
@github
@in_container
def run(until: str | None, **options: Any) -> None:
    """Do the whole job for TARGET: from training to a committed release."""
    if "auto" in (options["precision"], options["runtime"]):
        from toolkit.commands import sweep

        for name, given in {"until": until, **options}.items():
            if name in ("until", "waves", "junit", "github", "in_container") and given:
                raise click.UsageError(
                    f"--{name.replace('_', '-')} does not go with 'auto', which measures several"
                )
        given = click.get_current_context().get_parameter_source("parallel") is ParameterSource.COMMANDLINE
        sweep.go(options, options["parallel"] if given else None, commit=True)
    if until == "latency" and options["flops"]:
        raise click.UsageError("--until latency finds the budget itself; leave out --flops")
    if until == "latency" and options["waves"]:
        raise click.UsageError("--until latency measures on one device, and --waves are of a fleet; leave one out")
    _go("commit", options, until)


def _verb(stage: str, what: str, until: str | None = None) -> click.Command:
    @click.command(stage, help=f"{what} for TARGET; reuses what is there.")
    @run_options
    @junit
    @github
    @in_container
    def verb(**options: Any) -> None:
        _go(until or stage, options)

    return verb


train = _verb("train", "Train the unpruned network")
prune = _verb("prune", "Go up to pruning")
finetune = _verb("finetune", "Go up to fine-tuning the pruned network")
export = _verb("export", "Go up to the ONNX file")
quantize = _verb("quantize", "Go up to the graph in the profile's precision")
build = _verb("build", "Go up to the engine")
push = _verb("push", "Go up to the release on the device, not current yet")
bench = _verb("bench", "Measure, judge and write the page, without making the release current", until="report")
