"""This machine as a device: a folder, and the agent as a process of its own."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit import process
from toolkit.agent import facts
from toolkit.devices.content import blocks, opened
from toolkit.errors import disk_errors
from toolkit.process import Finished


class LocalDevice:
    """This machine.

    Args:
        root: Folder for releases.
    """

    name = "this machine"
    python = sys.executable

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.lease: str | None = None

    def facts(self) -> dict[str, Any]:
        """Return what this machine is; asked once."""
        return self._facts

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return facts.collect({"root": self.root})

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str = "",
        on_line: Callable[[str], None] = lambda line: None,
        timeout: float | None = None,
    ) -> Finished:
        """Run a program; see :class:`toolkit.devices.Device`."""
        return process.run(argv, stdin=stdin, on_line=on_line, timeout=timeout)

    def put(self, source: Path | bytes, destination: str) -> None:
        """Copy a file or bytes into place."""
        path = Path(destination)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with disk_errors(Path(self.root), path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                temporary.write_bytes(source)
            else:
                shutil.copyfile(source, temporary)
            temporary.replace(path)

    def upload(self, source: Path | bytes, destination: str, offset: int, progress: Callable[[int], None]) -> None:
        """Copy a file or bytes from ``offset`` on, in place."""
        path = Path(destination)
        with disk_errors(Path(self.root), path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            with path.open("r+b") as there, opened(source) as here:
                here.seek(offset)
                there.seek(offset)
                there.writelines(blocks(here, progress))

    def get(self, source: str, destination: Path) -> None:
        """Copy a file back."""
        shutil.copyfile(source, destination)

    def exists(self, path: str) -> bool:
        """Tell whether a file is there."""
        return Path(path).exists()

    def remove(self, path: str) -> None:
        """Remove a file, or a folder and what is in it."""
        if Path(path).is_file():
            Path(path).unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
