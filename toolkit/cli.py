"""The Click group: verbs load when they are called, and every error of the user's ends in a sentence."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import click

from toolkit import __version__
from toolkit.errors import ToolkitError

_VERBS = {
    "run": "toolkit.commands.run",
    "plan": "toolkit.commands.plan",
    "train": "toolkit.commands.run",
    "prune": "toolkit.commands.run",
    "finetune": "toolkit.commands.run",
    "export": "toolkit.commands.run",
    "quantize": "toolkit.commands.run",
    "build": "toolkit.commands.run",
    "push": "toolkit.commands.run",
    "bench": "toolkit.commands.run",
    "sweep": "toolkit.commands.sweep",
    "profile-table": "toolkit.commands.profile_table",
    "compare": "toolkit.commands.compare",
    "report": "toolkit.commands.report",
    "targets": "toolkit.commands.targets",
    "profiles": "toolkit.commands.profiles",
    "provision": "toolkit.commands.provision",
    "releases": "toolkit.commands.releases",
    "rollback": "toolkit.commands.rollback",
    "trust": "toolkit.commands.trust",
    "predict": "toolkit.commands.predict",
    "containers": "toolkit.commands.containers",
    "doctor": "toolkit.commands.doctor",
    "gc": "toolkit.commands.gc",
    "init": "toolkit.commands.init",
}


class _Verbs(click.Group):
    """Loads a verb's module when the verb is asked for; turns errors into sentences and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(_VERBS[cmd_name])
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in _VERBS:
            from toolkit import units

            raise click.UsageError(f"no command is called '{args[0]}'; {units.nearest(args[0], list(_VERBS))}", ctx)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            sys.exit(super().main(*args, **{**kwargs, "standalone_mode": False}))
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo("\ninterrupted; the same command continues where it stopped", err=True)
            sys.exit(130)
        except ToolkitError as error:
            tell(error)
            sys.exit(error.exit_code)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(1)


def tell(error: ToolkitError) -> None:
    """Print an error and its remedy on stderr."""
    click.echo(click.style("error: ", fg="red") + error.message, err=True)
    if error.hint:
        click.echo(click.style("hint: ", fg="cyan") + error.hint, err=True)


def print_json(value: Any) -> None:
    """Print a JSON document on stdout."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(version)s")
def cli() -> None:
    """Get a vision model onto an edge device, and prove it there.

    train → prune → finetune → export → quantize → build → push → bench → judge → commit or roll back
    """
