"""`toolkit containers`: which images there are, which a target would use and why; build them; examine this host."""

from __future__ import annotations

from typing import Any

import click

from toolkit.commands.options import complete


@click.group(invoke_without_command=True)
@click.pass_context
def containers(ctx: click.Context) -> None:
    """List, build or examine the container images."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(listed)


def _described(choice: dict[str, Any]) -> list[str]:
    from toolkit.containers import images

    tensorrt, sure = choice.get("tensorrt"), choice.get("sure")
    return [*([f"TensorRT {tensorrt}"] if tensorrt else []), *([images.CERTAINTY[sure]] if sure else [])]


@containers.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def listed(as_json: bool = False) -> None:
    """List every image, and which one a target would use and why."""
    from toolkit import files
    from toolkit.cli import print_json
    from toolkit.containers import images
    from toolkit.errors import StageError

    catalogue = images.catalogue()
    targets: dict[str, Any] = {}
    for name in sorted(files.names("targets")):
        try:
            targets[name] = vars(images.image_for(files.load_target(name), {}))
        except StageError as error:
            targets[name] = {"image": None, "why": error.message}
    if as_json:
        kept = ("tag", "base", "platforms")
        shown = {name: {key: getattr(image, key) for key in kept} for name, image in catalogue.items()}
        print_json({"images": shown, "targets": targets})
        return
    for name, image in catalogue.items():
        click.echo(f"{name:<16} {image.tag:<36} {image.base}, {' and '.join(image.platforms)}")
    click.echo()
    for rule in images.rules():
        if l4t := rule.get("l4t"):
            click.echo(f"{rule['image']:<16} {'L4T ' + ' '.join(l4t):<36} {'; '.join(_described(rule))}")
    click.echo()
    for name, choice in targets.items():
        click.echo(f"{name:<16} {choice['image'] or '-':<36} {'; '.join([choice['why'], *_described(choice)])}")


@containers.command()
@click.argument("names", nargs=-1)
@click.option("--platform", metavar="OS/ARCH", help="Build for this platform, emulated if need be, as linux/arm64.")
def build(names: tuple[str, ...], platform: str | None) -> None:
    """Build the named images, or all that this host can."""
    from toolkit import units
    from toolkit.console import Console
    from toolkit.containers import building, find_engine, images
    from toolkit.errors import StageError, UsageError

    catalogue = images.catalogue()
    for name in names:
        if name not in catalogue:
            raise UsageError(f"no image is called '{name}'", units.nearest(name, list(catalogue)))
    engine = find_engine()
    wanted = platform or engine.platform
    built = failed = 0
    for name in names or catalogue:
        platforms = catalogue[name].platforms
        try:
            if wanted not in platforms:
                raise StageError(f"it is for {' and '.join(platforms)}, not for {wanted}")
            building.build_image(engine, name, Console().say, platform)
        except StageError as error:
            failed += 1
            click.echo(f"{name:<16} {'failed' if names else 'skipped'}: {error.message}")
            if error.hint:
                click.echo(f"{'':<16} {click.style('hint:', fg='cyan')} {error.hint}")
        else:
            built += 1
            click.echo(f"{name:<16} built {catalogue[name].tag}")
    raise click.exceptions.Exit(1 if (failed if names else not built) else 0)


@containers.command()
@click.argument("target", required=False, shell_complete=complete("targets"))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def doctor(target: str | None, as_json: bool) -> None:
    """Examine the container engine of this host, or of TARGET's."""
    from toolkit import files
    from toolkit.checks import failed
    from toolkit.cli import print_json
    from toolkit.commands.checklist import show
    from toolkit.containers.doctor import examine

    checks = examine(files.load_target(target) if target else None)
    if as_json:
        print_json([vars(check) for check in checks])
    else:
        show(checks)
    raise click.exceptions.Exit(1 if failed(checks) else 0)
