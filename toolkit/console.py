"""What a person sees while a run works: a line a stage on stderr, and how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from toolkit import units
from toolkit.store import Progress

_QUIET_SECONDS = 10.0  # between two lines about one stage, where no terminal is watching


class Console:
    """Progress on stderr, for a terminal or for a log.

    Args:
        quiet: Show warnings only.
        brief: Leave out stages that had nothing to do.
        about: What its stages are of, where several write to one terminal; brief in any case.
    """

    def __init__(self, *, quiet: bool = False, brief: bool = False, about: str = "") -> None:
        self.quiet = quiet
        self.brief = brief or bool(about)
        self.about = f"{about}: " if about else ""
        self.live = sys.stderr.isatty() and not quiet and not about

    def say(self, text: str) -> None:
        """Print a line."""
        if not self.quiet:
            click.echo(text, err=True)

    def warn(self, text: str) -> None:
        """Print a warning, also when quiet."""
        click.echo(click.style("warning: ", fg="yellow") + self.about + text, err=True)

    def stage(self, name: str, text: str) -> None:
        """Print what became of a stage."""
        self.say(f"{self.about}{click.style(f'{name:<9}', bold=True)} {text}")

    @contextmanager
    def progress(self, name: str) -> Iterator[Progress]:
        """Yield the callback that shows how far a stage is."""
        if self.live:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("[bold]{task.fields[stage]:<9}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            with Bar(*columns, console=RichConsole(stderr=True), transient=True) as bar:
                task = bar.add_task("", total=None, stage=name)
                yield lambda done, total, text: bar.update(
                    task, completed=done, total=total or None, description=text
                )
            return
        shown = time.monotonic()

        def line(done: int, total: int, text: str) -> None:
            nonlocal shown
            if time.monotonic() - shown >= _QUIET_SECONDS:
                shown = time.monotonic()
                self.stage(name, f"{done}/{total} {text}" if total else text)

        yield line


def reused(created: str, digest: str) -> str:
    """Return the words for a result that was there already."""
    return f"reused from {created[:16].replace('T', ' ')} UTC ({digest[:8]})"


def fresh(seconds: float) -> str:
    """Return the words for a result that was made now."""
    return f"done in {units.duration(seconds)}"
