"""What `toolkit targets` and `toolkit profiles` share: list, show, validate."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from toolkit.commands.options import complete


def group(kind: Literal["targets", "profiles"]) -> click.Group:
    """Return the verb for one kind of file."""
    singular = kind[:-1]

    @click.group(kind, invoke_without_command=True, help=f"List the {kind}; show or check one.")
    @click.pass_context
    def files(ctx: click.Context) -> None:
        if ctx.invoked_subcommand is None:
            ctx.invoke(listed)

    @files.command("list", help=f"List the {kind}: the working folder's and the shipped ones.")
    def listed() -> None:
        from toolkit import files
        from toolkit.errors import UsageError

        for name, path in sorted(files.names(kind).items()):
            try:
                text = _read(kind, path).description
            except UsageError as error:
                text = f"not valid: {error.message.splitlines()[0]}"
            click.echo(f"{name:<18} {text}")

    @files.command(help=f"Show a {singular} with every default filled in.")
    @click.argument("name", shell_complete=complete(kind))
    def show(name: str) -> None:
        import yaml

        from toolkit import files

        loaded: Any = files.load_profile(name) if kind == "profiles" else files.load_target(name)
        values = loaded.model_dump(mode="json", exclude={"name"}, exclude_none=True)
        click.echo(f"# {files.names(kind)[name]}")
        click.echo(yaml.safe_dump(values, sort_keys=False), nl=False)

    @files.command(help=f"Check a {singular} file.")
    @click.argument("file", type=click.Path(path_type=Path))
    def validate(file: Path) -> None:
        _read(kind, file)
        click.echo(f"{file} is a valid {singular}")

    return files


def _read(kind: str, path: Path) -> Any:
    from toolkit import config, files

    if kind == "profiles":
        return files.read_file(config.Profile, path)
    return files.read_file(config.Target, path)
