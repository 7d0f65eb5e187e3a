"""Entry point of ``toolkit`` and of ``python -m toolkit``."""

from __future__ import annotations

import signal
from typing import NoReturn


class _Interrupt(KeyboardInterrupt):
    """Ctrl-C, as a class of its own.

    A plain KeyboardInterrupt that arises in source code given to exec() or eval(), as a named tuple's is, makes
    CPython end itself by SIGINT even though it was caught (CPython's pythonrun.c, run_eval_code_obj).
    """


def _interrupt(*_: object) -> NoReturn:
    raise _Interrupt


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _interrupt)
    from toolkit.cli import cli

    cli(prog_name="toolkit")


if __name__ == "__main__":
    main()
