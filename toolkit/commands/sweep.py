"""`toolkit sweep`: many candidates measured on the device, and the one to ship."""

from __future__ import annotations

from typing import Any, NoReturn

import click
from click.core import ParameterSource

from toolkit.commands.options import job_from, run_options


def go(
    options: dict[str, Any], parallel: int | None, *, commit: bool, halving: bool = False, ray: str | None = None
) -> NoReturn:
    """Sweep what the options ask for, print what was found, and leave."""
    from toolkit import candidates, config, engines, sweep
    from toolkit.cli import print_json, tell
    from toolkit.console import Console
    from toolkit.errors import UsageError
    from toolkit.report import terminal

    flops, precision, runtime, pruner = (options.get(key) for key in ("flops", "precision", "runtime", "pruner"))
    plain = options | dict.fromkeys(("flops", "precision", "runtime", "pruner"))
    if precision:  # the profile's may be one that is not asked for
        plain["precision"] = next((word for word in precision.split(",") if word != "auto"), "fp32")
    for option, given in (("--flops", flops), ("--pruner", pruner)):
        if given and options["model"].startswith("onnx:"):
            raise UsageError("an ONNX file is not pruned to a budget", f"leave out {option}")
    job = job_from(**plain)
    try:
        budgets = [config.Flops.parse(word) for word in flops.split(",")] if flops else [job.budget]
    except ValueError as error:
        raise UsageError(f"--flops: {error}", "write amounts (60M) or shares of the baseline (75%)") from None
    axes = candidates.Axes(
        budgets,
        _words(precision, [job.precision], lambda: engines.PRECISIONS),
        _words(pruner, [job.profile.pruner], tuple),
        _words(runtime, [], lambda: candidates.runtimes_for(job.target)),
    )
    console = Console(quiet=options["quiet"])
    rerun = frozenset(options["rerun"])
    outcome = sweep.execute(job, axes, console, rerun, parallel, commit=commit, halving=halving, ray=ray)
    if options["as_json"]:
        print_json(outcome.document)
    else:
        click.echo(terminal.sweep(outcome.document))
    if outcome.error:
        tell(outcome.error)
    raise click.exceptions.Exit(outcome.exit_code)


def _words(text: str | None, default: list[Any], auto: Any) -> list[Any]:
    """Return the words of a list; ``auto`` stands for all that there are."""
    words = text.split(",") if text else default
    return [one for word in words for one in (auto() if word == "auto" else [word])]


@click.command()
@run_options
@click.option("--halving", is_flag=True, help="Drop a budget's worse networks after a quarter of the fine-tuning.")
@click.option("--commit", is_flag=True, help="Make the recommended one the device's current release.")
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Make the networks on the Ray cluster there (ray://HOST:10001), not on this machine.",
)
@click.pass_context
def sweep(
    context: click.Context, /, parallel: int, commit: bool, halving: bool, ray: str | None, **options: Any
) -> None:
    """Measure many candidates for TARGET on its device, and say which to ship.

    --flops, --pruner, --precision and --runtime take lists (75%,60%,45%); every combination is a candidate.
    They share the training and the search; each is built, delivered, measured and held against the contract,
    and nothing becomes current without --commit. Exits with 0 when one of them keeps the contract.
    """
    given = context.get_parameter_source("parallel") is ParameterSource.COMMANDLINE
    go(options, parallel if given else None, commit=commit, halving=halving, ray=ray)
