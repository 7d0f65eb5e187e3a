"""`toolkit run`, and a verb for each stage that goes up to and with it."""

from __future__ import annotations

from typing import Any

import click

from toolkit.commands.options import job_from, run_options


def _go(until: str, options: dict[str, Any]) -> None:
    from toolkit import runs
    from toolkit.cli import print_json, tell
    from toolkit.console import Console
    from toolkit.report import terminal

    outcome = runs.execute(job_from(**options), until, Console(quiet=options["quiet"]), frozenset(options["rerun"]))
    if options["as_json"]:
        print_json(outcome.document)
    elif text := terminal.summary(outcome.document):
        click.echo(text)
    if outcome.error:
        tell(outcome.error)
    raise click.exceptions.Exit(outcome.exit_code)


@click.command()
@run_options
def run(**options: Any) -> None:
    """Do the whole job for TARGET: from training to a committed release."""
    _go("commit", options)


def _verb(stage: str, what: str) -> click.Command:
    @click.command(stage, help=f"{what} for TARGET; reuses what is there.")
    @run_options
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
