"""`toolkit report`: the page of a run again, or several runs side by side."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from toolkit.commands.options import build_folder


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    found = (Path(ctx.params.get("build_folder") or "build") / "runs").glob(f"{incomplete}*")
    return [CompletionItem(path.name) for path in sorted(found)]


@click.command()
@click.argument("run", nargs=-1, shell_complete=_complete)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write here; by default the page in the run's folder, text on stdout.",
)
@click.option("--markdown", "form", flag_value="markdown", help="Markdown for a pull request instead of the page.")
@click.option(
    "--json", "form", flag_value="json", help="The run's document instead of the page; of several, a list."
)
@build_folder
def report(run: tuple[str, ...], output: Path | None, form: str | None, build_folder: Path) -> None:
    """Write the page of RUN again, from what was measured then; by default of the newest run.

    Several runs, or a run on several devices, are set side by side.
    """
    import json

    from toolkit.errors import disk_errors
    from toolkit.report import recorded

    documents = recorded.find(build_folder, run)
    with disk_errors(output.parent if output else build_folder, "the report"):
        if form is None:
            click.echo(recorded.write(build_folder, documents, output))
            return
        if form == "json":
            text = json.dumps(documents[0] if len(documents) == 1 else documents, indent=1, ensure_ascii=False)
        else:
            text = "\n".join(recorded.markdown(document) for document in documents)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text + "\n", encoding="utf-8")
        else:
            click.echo(text)
