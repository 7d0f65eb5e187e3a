"""What a doctor finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """One line of a doctor's: ``pass``, ``warn`` or ``fail``, and what to do about it."""

    name: str
    status: Literal["pass", "warn", "fail"]
    text: str
    hint: str | None = None


def failed(checks: list[Check]) -> bool:
    """Tell whether one of the checks is a failure."""
    return any(check.status == "fail" for check in checks)
