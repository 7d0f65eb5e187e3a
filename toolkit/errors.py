"""The exceptions that users see: one sentence with the cause, one with the remedy."""

from __future__ import annotations


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
