"""A run of the toolkit inside its own training image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import process
from toolkit.containers import Say, find_engine, images, remove, run_command, unique_name
from toolkit.containers.building import require_image
from toolkit.containers.images import Choice
from toolkit.errors import StageError, UsageError, disk_errors

if TYPE_CHECKING:
    from toolkit.job import Job


def run_inside(arguments: Sequence[str], job: Job, say: Say) -> int:
    """Run the toolkit with the same arguments in the ``train`` image, with the terminal's own streams.

    Args:
        arguments: Of the command line.
        job: What they describe; what it reads and writes is at the same path inside.
        say: Told of the image's progress.

    Returns:
        The command's exit code.

    Raises:
        StageError: There is no engine or no image, or the container could not be started.
        UsageError: The target's ``root`` is a path below HOME, which is another one inside.
    """
    if (job.target.root or "").startswith("~"):
        raise UsageError(
            f"the root '{job.target.root}' of '{job.target.name}' is another folder in a container",
            "write it as an absolute path, or leave --in-container out",
        )
    engine = find_engine()
    image = images.catalogue()["train"]
    require_image(engine, Choice(image.tag, "it trains", image.name, image.base), say)
    written = [path.absolute() for path in (job.build, Path(job.target.root or job.build))]
    for path in written:
        with disk_errors(path, "the run"):
            path.mkdir(parents=True, exist_ok=True)
    graph = None if job.model.trainable else job.model.name
    given = (job.data.path, job.model.checkpoint, job.teacher and job.teacher.checkpoint, graph)
    read = [Path(path).expanduser().absolute() for path in given if path]
    name = unique_name()
    command = run_command(
        engine,
        image.tag,
        ["toolkit", *arguments],
        mounts=sorted({str(path) for path in (Path.cwd(), *written, *read) if path.exists()}),
        gpu=engine.gpu is not None,
        name=name,
        home=f"{written[0]}/home",
        env={key: os.environ[key] for key in ("TOOLKIT_BUILD", "NO_COLOR") if key in os.environ},
        network="host",
        workdir=str(Path.cwd()),
        shared_memory=None if job.gpus is None else "1g",  # NCCL's guide, "Shared memory"
    )
    try:
        returncode = process.attach(command)
    finally:
        remove(engine, name)
    if returncode in (125, 126, 127):
        raise StageError(
            f"{engine.command} could not run {image.tag} (exit {returncode})", "its reason stands above"
        )
    return returncode
