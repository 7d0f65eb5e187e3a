"""What a person sees while a fleet is at work: a row a host on a terminal, lines with the host's name elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from toolkit.console import Console
from toolkit.store import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Rows
    from rich.progress import TaskID


class Board:
    """The progress of a fleet.

    Args:
        console: Who is told of the fleet as a whole.
        hosts: Their names.
    """

    def __init__(self, console: Console, hosts: Sequence[str]) -> None:
        self.console = console
        self.width = max(len(host) for host in hosts)
        self.rows: Rows | None = None
        self.tasks: dict[str, TaskID] = {}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the rows of the hosts that are at work, where a terminal is watching."""
        if not self.console.live:
            yield
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Rows

        columns = (
            TextColumn("{task.fields[host]}", style="bold", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
        )
        with Rows(*columns, console=RichConsole(stderr=True), transient=True) as self.rows:
            yield
        self.rows = None
        self.tasks.clear()

    def say(self, text: str) -> None:
        """Print a line, above the rows if there are any."""
        if self.rows is None:
            click.echo(text, err=True)
            return
        from rich.text import Text

        self.rows.console.print(Text.from_ansi(text), soft_wrap=True)


class HostConsole(Console):
    """The progress of one host of a fleet."""

    def __init__(self, board: Board, host: str) -> None:
        super().__init__(quiet=board.console.quiet)
        self.live = False
        self._board = board
        self._host = host

    def say(self, text: str) -> None:
        """Print a line."""
        if not self.quiet:
            self._board.say(f"{click.style(f'{self._host:<{self._board.width}}', bold=True)}  {text}")

    def warn(self, text: str) -> None:
        """Print a warning, also when quiet."""
        self._board.say(click.style("warning: ", fg="yellow") + f"{self._host}: {text}")

    def stage(self, name: str, text: str) -> None:
        """Show what became of a stage."""
        if self._board.rows is None:
            super().stage(name, text)
        else:
            self._update(f"{name:<9} {text}", 0, 0)

    @contextmanager
    def progress(self, name: str) -> Iterator[Progress]:
        """Yield the callback that shows how far a stage is."""
        if self._board.rows is None:
            with super().progress(name) as progress:
                yield progress
        else:
            self._update(name, 0, 0)
            yield lambda done, total, text: self._update(f"{name:<9} {text}", done, total)

    def ended(self, text: str) -> None:
        """Take the row away and print what became of the host."""
        if self._board.rows is not None and self._host in self._board.tasks:
            self._board.rows.remove_task(self._board.tasks.pop(self._host))
        self.say(text)

    def _update(self, text: str, done: int, total: int) -> None:
        rows, tasks = self._board.rows, self._board.tasks
        assert rows is not None
        if self._host not in tasks:
            tasks[self._host] = rows.add_task("", total=None, host=f"{self._host:<{self._board.width}}")
        rows.update(tasks[self._host], completed=done, total=total or None, description=text)
