"""A container as a device: files go to the machine that it runs on, programs run inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit import containers
from toolkit.containers import ContainerEngine
from toolkit.devices import Device
from toolkit.errors import StageError
from toolkit.process import Finished


class ContainerDevice:
    """A machine's container, started anew for every program, with the machine's ``root`` at the same path.

    Args:
        inner: The machine.
        engine: Its container engine.
        image: Name and tag; see :func:`toolkit.containers.building.require_image`.
        gpu: Whether the programs need the GPUs.
    """

    python = "python3"

    def __init__(self, inner: Device, engine: ContainerEngine, image: str, gpu: bool) -> None:
        self.inner = inner
        self.engine = engine
        self.image = image
        self.gpu = gpu
        self.root = inner.root
        self.name = f"container {image} on {inner.name}"
        self._has_root = False

    @property
    def lease(self) -> str | None:
        """That of the machine."""
        return self.inner.lease

    @lease.setter
    def lease(self, token: str | None) -> None:
        self.inner.lease = token

    def facts(self) -> dict[str, Any]:
        """Return what the agent in the container sees of its machine; asked once."""
        return self._facts

    @cached_property
    def _facts(self) -> dict[str, Any]:
        from toolkit.devices.agent import Agent

        return Agent(self).ask("facts", {"root": self.root})

    @cached_property
    def _identity(self) -> str:
        """The image with its digest, which becomes part of an engine's fingerprint."""
        image = containers.inspect(self.engine, self.image) or {}
        digest = next(iter(image.get("RepoDigests") or ()), image.get("Id", "")).rpartition("@")[2]
        return f"{self.image}@{digest}"

    def _make_root(self) -> None:
        """Make the folder that is mounted, once: docker does not."""
        if not self._has_root:
            self.inner.run(["mkdir", "-p", "--", self.root])
            self._has_root = True

    def command(self, argv: Sequence[str], name: str, env: Mapping[str, str] | None = None) -> list[str]:
        """Return the command that runs a program in a container of that name."""
        mounts, home = [self.root], f"{self.root}/home"
        return containers.run_command(
            self.engine, self.image, argv, mounts=mounts, gpu=self.gpu, name=name, home=home, env=env
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str = "",
        on_line: Callable[[str], None] = lambda line: None,
        timeout: float | None = None,
    ) -> Finished:
        """Run a program inside; however it ends, no container is left.

        Raises:
            StageError: The container could not be started, or the program ran past ``timeout``.
        """
        self._make_root()
        name = containers.unique_name()
        command = self.command(argv, name, {"TOOLKIT_IMAGE": self._identity})
        ended = False
        try:
            finished = self.inner.run(command, stdin=stdin, on_line=on_line, timeout=timeout)
            ended = finished.returncode == 0
        finally:
            if not ended:
                with contextlib.suppress(StageError):
                    containers.remove(self.engine, name)
        if error := containers.refused(self.engine, self.image, finished.returncode, finished.stderr):
            raise error
        return finished

    def put(self, source: Path | bytes, destination: str) -> None:
        """Copy a file or bytes to the machine."""
        self.inner.put(source, destination)

    def upload(self, source: Path | bytes, destination: str, offset: int, progress: Callable[[int], None]) -> None:
        """Copy a file or bytes to the machine from ``offset`` on, in place."""
        self.inner.upload(source, destination, offset, progress)

    def get(self, source: str, destination: Path) -> None:
        """Copy a file back from the machine."""
        self.inner.get(source, destination)

    def exists(self, path: str) -> bool:
        """Tell whether a file is there."""
        return self.inner.exists(path)

    def remove(self, path: str) -> None:
        """Remove a folder and what is in it."""
        self.inner.remove(path)
