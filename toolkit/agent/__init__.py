"""The only code that runs on a device: one zipapp of standard library, NumPy and the runtime itself.

It reads one JSON document from standard input and writes JSON lines to standard output. It runs on Python 3.8
and imports nothing else of this project.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import Model

PROTOCOL = 1


def load(current: str, reload: bool = True) -> Model:
    """Load a device's current release into a program that runs there; see :class:`Model`."""
    from .model import Model  # NumPy with it

    return Model(current, reload)
