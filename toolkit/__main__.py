"""Entry point of ``toolkit`` and of ``python -m toolkit``."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from toolkit.cli import cli

    cli(prog_name="toolkit")


if __name__ == "__main__":
    main()
