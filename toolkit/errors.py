"""The exceptions that users see: one sentence with the cause, one with the remedy."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path


class ToolkitError(Exception):
    """A failure that the user can act on; shown without a traceback.

    Args:
        message: What happened and where, one sentence.
        hint: What to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ToolkitError):
    """The command line, a configuration file, or the user's data or model is wrong."""

    exit_code = 2


class StageError(ToolkitError):
    """A stage could not be completed."""


class InterruptionError(ToolkitError):
    """Ctrl-C came while many things were at work, and what became of each is known."""

    exit_code = 130


@contextlib.contextmanager
def disk_errors(folder: Path, what: str) -> Iterator[None]:
    """Turn a full disk or a missing permission into a sentence.

    Args:
        folder: Where is written.
        what: Who could not be written: ``stage 'train'``, ``the run's record``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StageError(
                f"the disk is full: {what} could not be written to {folder}",
                "free space (toolkit gc), then run the same command again; finished stages are kept",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise StageError(
                f"no permission for {error.filename or folder}: {error.strerror}",
                "change its permissions, or choose another folder (--build DIR)",
            ) from error
        raise
