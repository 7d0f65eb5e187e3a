"""`toolkit profile-table`: a device's latency model, and how far off it is."""

from __future__ import annotations

from typing import Any

import click

from toolkit.commands.options import job_from, run_options


@click.command("profile-table")
@run_options
def profile_table(**options: Any) -> None:
    """Measure TARGET's layers at three widths, and say how well they predict the latency of other networks.

    The smallest network that pruning can make, the whole one, and one between are measured without fine-tuning.
    Each network that was ever measured there is then predicted from the layers of the others.
    """
    from toolkit import bisection
    from toolkit.cli import print_json
    from toolkit.console import Console

    for option in ("flops", "rerun"):
        if options[option]:
            raise click.UsageError(f"profile-table has widths of its own to measure; leave out --{option}")
    console = Console(quiet=options["quiet"])
    found = bisection.profile(job_from(**options), console)
    if options["as_json"]:
        print_json(found)
        return
    for network in found["networks"]:
        click.echo(
            f"{network['network']:>8} FLOPs  measured {network['measured_ms']:.3f} ms"
            f"  predicted {network['predicted_ms']:.3f} ms  {network['error']:+.1%}"
        )
    click.echo(f"error     median {found['median_error']:.1%}, at most {found['max_error']:.1%}")
