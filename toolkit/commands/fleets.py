"""How the verbs that look after releases do the same on every host of a fleet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from toolkit.config import Target
    from toolkit.errors import ToolkitError

T = TypeVar("T")


def on_each(target: Target, parallel: int, work: Callable[[Target], T]) -> dict[str, T | ToolkitError]:
    """Do something for every host of a target's fleet; returns the result or the error of each."""
    from toolkit.delivery import fleet

    return fleet.each(target.fleet, lambda host: work(target.at(host)), parallel)


def show(results: Mapping[str, str | ToolkitError]) -> NoReturn:
    """Print what each host said, its name before every line, and leave."""
    from toolkit.errors import ToolkitError

    width = max(map(len, results))
    for host, result in results.items():
        text = _sentences(result) if isinstance(result, ToolkitError) else result
        for line in text.splitlines():
            click.echo(f"{host:<{width}}  {line}")
    leave(results)


def _sentences(error: ToolkitError) -> str:
    hint = f"\n{click.style('hint: ', fg='cyan')}{error.hint}" if error.hint else ""
    return click.style("error: ", fg="red") + error.message + hint


def as_json(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the documents of the hosts; one with an error has only that."""
    from toolkit.errors import ToolkitError

    return [
        {"host": host, "error": {"message": result.message, "hint": result.hint}}
        if isinstance(result, ToolkitError)
        else {"host": host, **result}
        for host, result in results.items()
    ]


def leave(results: Mapping[str, object]) -> NoReturn:
    """Leave with 1 when one of the hosts failed."""
    from toolkit.errors import ToolkitError

    failed = any(isinstance(result, ToolkitError) for result in results.values())
    raise click.exceptions.Exit(1 if failed else 0)
