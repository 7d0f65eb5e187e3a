"""The options that every run takes, and the job they describe."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from toolkit.config import Gpus, Target
    from toolkit.job import Job

    _Words = click.ParamType[str]
else:
    _Words = click.ParamType  # generic from click 8.5 on

_Function = TypeVar("_Function", bound=Callable[..., Any])

RERUN = (
    "data", "check", "teacher", "train", "prune", "finetune", "export", "quantize", "reference", "build", "bench",
    "compare", "report", "all",
)  # fmt: skip


def complete(kind: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return the completion of names of ``targets`` or ``profiles``."""

    def names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from toolkit import files

        return [CompletionItem(name) for name in files.names(kind) if name.startswith(incomplete)]

    return names


class Several(_Words):
    """A list of another type's values, with commas between them; it stays text."""

    def __init__(self, of: click.ParamType[Any]) -> None:
        self.of, self.name = of, of.name

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return ",".join(self.of.convert(word.strip(), param, ctx) for word in value.split(","))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        return self.of.get_metavar(param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return self.of.shell_complete(ctx, param, incomplete)


build_folder = click.option(
    "--build",
    "build_folder",
    type=click.Path(file_okay=False, path_type=Path),
    default="build",
    envvar="TOOLKIT_BUILD",
    show_default=True,
    help="Folder for artifacts, runs and downloads.",
)

host = click.option("--host", help="Where the target is; the target file's host by default.")

_WHERE = (
    host,
    click.option("--hosts", metavar="A,B,C", help="These hosts, whatever the target file says."),
    click.option("--group", help="The hosts of this group of the target file."),
    click.option("--parallel", type=click.IntRange(1), default=8, metavar="N",
                 help="How many hosts (8), in a sweep networks (as many as GPUs or cores), are at work at a time."),
    click.option("--accept-new-host-key", is_flag=True, help="Trust a host key that nobody knows yet."),
)  # fmt: skip

in_container = click.option(
    "--in-container", is_flag=True, help="Run in the training image (NGC PyTorch), with the GPU if there is one."
)

junit = click.option(
    "--junit",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the verdict as JUnit XML, a case a clause.",
)
github = click.option("--github", is_flag=True, help="Annotate on GitHub what was not kept (on stderr).")


def _seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float:
    from toolkit import units

    try:
        return 0.0 if value is None else units.parse(value, units.SECONDS)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


wait = click.option(
    "--wait",
    metavar="TIME",
    callback=_seconds,
    help="Wait so long (10m) while somebody else is at work on the device.",
)
steal = click.option(
    "--steal", is_flag=True, help="Take the device from whoever is at work on it; they are stopped."
)


def _gpus(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "all":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"'{value}' is neither a number of GPUs nor 'all'")
    return int(value)


_OPTIONS = (
    click.argument("target", shell_complete=complete("targets")),
    click.option("--model", default="resnet20", show_default=True, metavar="MODEL",
                 help="resnet20, torchvision:NAME, package.module:factory or onnx:FILE."),
    click.option("--data", default="digits", show_default=True, metavar="DATA",
                 help="digits, cifar10 or imagefolder:PATH; with an ONNX file also inputs:FILE.npy or none."),
    click.option("--weights", metavar="FILE",
                 help="Start from this checkpoint (safetensors or state dict), or from 'torchvision', its own."),
    click.option("--teacher", metavar="MODEL[=FILE]",
                 help="Learn from this model with its checkpoint; without one, it is trained first."),
    click.option("--mean", metavar="NUMBERS",
                 help="Pixel mean, 0 to 1, that an ONNX file expects: one number or three."),
    click.option("--std", metavar="NUMBERS", help="Pixel standard deviation that goes with --mean."),
    click.option("--input-range", type=click.Choice(["0,1", "0,255", "-1,1"]),
                 help="Pixel range that an ONNX file expects, instead of --mean and --std."),
    click.option("--profile", shell_complete=complete("profiles"), help="Profile instead of the target's own."),
    click.option("--flops", metavar="BUDGET", type=Several(click.STRING), help="FLOPs budget, as 60M or 75%."),
    click.option("--pruner", type=Several(click.Choice(["fastnas", "depgraph"])),
                 help="Pruner instead of the profile's."),
    click.option("--precision", type=Several(click.Choice(["fp32", "fp16", "int8", "fp8", "auto"])),
                 help="Precision of the engine; auto: the one that measures best."),
    click.option("--runtime",
                 type=Several(click.Choice(["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "auto"])),
                 help="Runtime instead of the target's own; auto: the one that measures best."),
    click.option("--rebuild-stale", is_flag=True, help="Build on the device what does not fit it."),
    *_WHERE,
    wait,
    steal,
    click.option("--seed", type=click.IntRange(0, 2**31), default=123, show_default=True),
    click.option("--gpus", metavar="N|all", callback=_gpus, help="Train on several GPUs of this machine."),
    click.option("--fast", is_flag=True, help="A short recipe on part of the data; the result is marked."),
    click.option("--allow-fast", is_flag=True, help="Let a fast run become the current release."),
    click.option("--skip-bad-images", is_flag=True, help="Leave out files that are no image, and count them."),
    click.option("--rerun", type=click.Choice(RERUN), is_flag=False, flag_value="all", multiple=True,
                 help="Make a stage (all without a name) anew."),
    build_folder,
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
    click.option("-v", "--verbose", count=True, help="Say more: commands (-v), libraries (-vv)."),
    click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings, errors and the result."),
)  # fmt: skip


def run_options(function: _Function) -> _Function:
    """Add the options that every run takes."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def where(function: _Function) -> _Function:
    """Add the options that say which device, or which fleet, is meant; :func:`target_from` takes them."""
    for option in reversed(_WHERE):
        function = option(function)
    return function


def target_from(
    name: str,
    host: str | None,
    runtime: str | None = None,
    *,
    hosts: str | None = None,
    group: str | None = None,
    accept_new_host_key: bool = False,
) -> Target:
    """Return a target by its name, on other hosts or with another runtime if these are given.

    Raises:
        UsageError: There is no such target or group, or it does not go with the runtime.
    """
    from toolkit import files, units
    from toolkit.errors import UsageError

    target = files.load_target(name)
    if sum(given is not None for given in (host, hosts, group)) > 1:
        raise UsageError("--host, --hosts and --group each say where the target is", "give one of them")
    if host is not None:
        target = target.at(host)
    elif hosts is not None:
        named = [word.strip() for word in hosts.split(",") if word.strip()]
        if not named:
            raise UsageError("--hosts names no host", "write --hosts a,b,c")
        target = target.across(named)
    elif group is not None:
        if group not in target.groups:
            raise UsageError(f"'{name}' has no group '{group}'", units.nearest(group, list(target.groups)))
        target = target.across(target.groups[group])
    if accept_new_host_key:
        target = target.model_copy(update={"accept_new_host_key": True})
    return target if runtime is None else with_runtime(target, runtime)


def with_runtime(target: Target, runtime: str) -> Target:
    """Return a target with another runtime; raises UsageError when it does not go with it."""
    from typing import cast

    from toolkit import config

    return target.using(cast(config.RuntimeName, runtime))


def job_from(
    *,
    target: str,
    model: str,
    data: str,
    weights: str | None,
    teacher: str | None,
    mean: str | None,
    std: str | None,
    input_range: str | None,
    profile: str | None,
    flops: str | None,
    pruner: str | None,
    precision: str | None,
    runtime: str | None,
    rebuild_stale: bool,
    host: str | None,
    hosts: str | None,
    group: str | None,
    accept_new_host_key: bool,
    seed: int,
    gpus: Gpus | None,
    fast: bool,
    allow_fast: bool,
    skip_bad_images: bool,
    build_folder: Path,
    wait: float,
    steal: bool,
    verbose: int,
    **_: Any,
) -> Job:
    """Return the job that the options describe; raises UsageError naming what is wrong."""
    from typing import cast

    from toolkit import config, files, workload
    from toolkit.delivery.lease import Claim
    from toolkit.errors import UsageError
    from toolkit.job import Job

    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)]
    logging.basicConfig(level=level)
    logging.getLogger("toolkit").setLevel(level)  # the root logger is silenced while libraries are at work
    for option, given in (("flops", flops), ("pruner", pruner), ("precision", precision), ("runtime", runtime)):
        if given is not None and "," in given:
            raise UsageError(
                f"--{option} {given} is a list", f"toolkit sweep {target} takes several values, other verbs one"
            )
    if "auto" in (precision, runtime):
        raise UsageError("'auto' is decided by measuring", f"toolkit run {target}, or toolkit sweep {target}")
    chosen = target_from(target, host, runtime, hosts=hosts, group=group, accept_new_host_key=accept_new_host_key)
    settings = files.load_profile(profile or chosen.profile)
    if pruner is not None:
        settings = settings.model_copy(update={"pruner": pruner})
    for option, given in (("--flops", flops), ("--pruner", pruner)):
        if given is not None and model.startswith("onnx:"):
            raise UsageError("an ONNX file is not pruned to a budget", f"leave out {option}")
    try:
        budget = settings.flops if flops is None else config.Flops.parse(flops)
    except ValueError as error:
        raise UsageError(f"--flops: {error}", "write an amount (60M) or a share of the baseline (75%)") from None
    return Job(
        target=chosen,
        profile=settings,
        model=workload.Model.parse(model, weights, workload.Normalization.parse(mean, std, input_range)),
        data=workload.Data.parse(data, skip_bad_images=skip_bad_images),
        precision=cast(config.Precision, precision or settings.precision),
        budget=budget,
        seed=seed,
        fast=fast,
        allow_fast=allow_fast,
        rebuild_stale=rebuild_stale,
        build=build_folder,
        claim=Claim(wait, steal),
        teacher=None if teacher is None else workload.Model.parse_teacher(teacher),
        gpus=gpus,
    )
