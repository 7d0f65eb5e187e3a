"""Quantities as people write them: `2 ms`, `75%`, `60M`, `150 MB`, `1000 samples/s`, `10 W`, `5 mJ`."""

from __future__ import annotations

import difflib
import re

_NUMBER = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(\S*)\s*$")

MILLISECONDS = {"ms": 1.0, "us": 1e-3, "µs": 1e-3, "μs": 1e-3, "s": 1e3}
SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
BYTES = {
    "B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9,
    "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30,
}  # fmt: skip
FRACTION = {"%": 0.01}
WATTS = {"W": 1.0, "mW": 1e-3}
MILLIJOULES = {"mJ": 1.0, "J": 1e3, "uJ": 1e-3, "µJ": 1e-3, "μJ": 1e-3}
RATE = {"/s": 1.0, "samples/s": 1.0, "images/s": 1.0}
FLOPS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def parse(text: object, units: dict[str, float]) -> float:
    """Parse a number with a unit.

    Args:
        text: What stands in the file, for example ``"2 ms"``.
        units: Allowed units, each with its factor to the base unit.

    Returns:
        The value in the base unit.

    Raises:
        ValueError: Not a number, or the unit is missing or not one of ``units``.
    """
    allowed = ", ".join(unit for unit in units if unit)
    match = _NUMBER.match(str(text)) if isinstance(text, (str, int, float)) else None
    if match is None or isinstance(text, bool):
        raise ValueError(f"{text!r} is not a number with a unit ({allowed})")
    number, unit = match.groups()
    if unit not in units:
        what = f"unit {unit!r} is not known here" if unit else f"{text!r} has no unit"
        raise ValueError(f"{what}; write one of {allowed}, as in '{number} {next(iter(units)) or 'M'}'")
    return round(float(number) * units[unit], 12)  # 95 % is 0.95, not a little more


def nearest(word: str, known: list[str]) -> str:
    """Return the hint that names the closest of the ``known`` words, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(sorted(known))}" if known else "none is known"


def count(value: float) -> str:
    """Format a large count with a suffix: ``81.5M``."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g}{suffix}"
    return f"{value:.0f}"


def flops(value: float) -> str:
    """Format FLOPs: ``81.1 MFLOPs``."""
    text = count(value)
    return f"{text[:-1]} {text[-1]}FLOPs" if text[-1].isalpha() else f"{text} FLOPs"


def size(value: float) -> str:
    """Format bytes: ``1.21 MB``."""
    for factor, suffix in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.3g} {suffix}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Format a duration: ``0.4 s``, ``2 min 05 s``, ``1 h 12 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
