"""A Jetson's knobs: power mode and clocks."""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any

from .programs import Root, ask, program, reason
from .protocol import Refusal


class PowerMode:
    """A Jetson's power mode, by nvpmodel.

    Args:
        root: Runs it.
        wanted: Name or number of the mode.
    """

    name = "power mode"
    lasting = True

    def __init__(self, root: Root, wanted: str = "") -> None:
        self._root = root
        self._wish = wanted
        self._program = program("nvpmodel")
        root.rights.append("{} -m [0-9]".format(self._program))

    @property
    def wanted(self) -> str:
        """Name of the mode; refuses one that the device does not have."""
        return self._mode()[1]

    def _mode(self) -> tuple[str, str]:
        said = ask(self._program, "-p", "--verbose")[1]
        modes = re.findall(r"POWER_MODEL: ID=(\d+) NAME=(\S+)", said)
        for mode in modes:
            if self._wish in mode:
                return mode[0], mode[1]
        known = ", ".join("{} ({})".format(name, number) for number, name in modes) or "none that nvpmodel tells"
        raise Refusal(
            "the device has no power mode '{}'; it has {}".format(self._wish, known),
            "correct power_mode in the target file",
        )

    def read(self) -> dict[str, str]:
        """Return the mode's ``id`` and ``name``."""
        said = ask(self._program, "-q")[1]
        found = re.search(r"NV Power Mode: *(\S+)\s+(\d+)", said)
        if found is None:
            raise Refusal("nvpmodel does not tell the power mode: {}".format(reason(said)), "nvpmodel -q there")
        return {"id": found.group(2), "name": found.group(1)}

    def show(self, state: dict[str, str]) -> str:
        """Return the mode's name."""
        return state["name"]

    def write(self) -> None:
        """Set the mode; refuses one that takes a reboot."""
        self._set(*self._mode())

    def reset(self, found: dict[str, str]) -> None:
        """Set the mode that was found."""
        self._set(found["id"], found["name"])

    def _set(self, number: str, name: str) -> None:
        _, said = self._root.ask(self._program, "-m", number, text="NO\n")  # whether to reboot now
        if "eboot required" in said:
            raise Refusal(
                "the device has to be rebooted to change to power mode {}".format(name),
                "sudo nvpmodel -m {} there, and let it reboot".format(number),
            )
        if self.read()["id"] != number:
            raise Refusal("nvpmodel does not set {}: {}".format(name, reason(said)), "try it there by hand")


class JetsonClocks:
    """A Jetson's CPU, GPU and memory clocks, by jetson_clocks: at the maximum of the power mode.

    Args:
        root: Runs it.
        wanted: ``locked``, or empty.
    """

    name = "clocks"
    lasting = False
    _FILE = "tuning.clocks"  # without a folder: jetson_clocks takes none with a space in it

    def __init__(self, root: Root, wanted: str = "locked") -> None:
        self.wanted = wanted
        self._root = root
        self._program = program("jetson_clocks")
        root.rights += [
            self._program + " " + options
            for options in ('""', "--show", "--store " + self._FILE, "--restore " + self._FILE)
        ]

    def read(self) -> dict[str, Any]:
        """Return what ``--store`` keeps, and whether each clock's lower limit is its upper one."""
        path = os.path.join(self._root.folder, self._FILE)
        _remove(path)  # jetson_clocks asks before it writes over a file
        try:
            self._root.run(self._program, "--store", self._FILE)
            with open(path, encoding="utf-8") as file:
                stored = file.read()
        finally:
            _remove(path)
        shown = self._root.run(self._program, "--show")
        limits = re.findall(r"^(?:cpu\d+: Online=1|GPU) .*?MinFreq=(\d+) MaxFreq=(\d+)", shown, re.M)
        return {"stored": stored, "locked": bool(limits) and all(low == high for low, high in limits)}

    def show(self, state: dict[str, Any]) -> str:
        """Return ``locked`` or ``floating``."""
        return "locked" if state["locked"] else "floating"

    def write(self) -> None:
        """Lock them."""
        self._root.run(self._program)

    def reset(self, found: dict[str, Any]) -> None:
        """Restore what was stored; whether it worked is told by reading, not by jetson_clocks."""
        path = os.path.join(self._root.folder, self._FILE)
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(found["stored"])
            self._root.ask(self._program, "--restore", self._FILE)
        finally:
            _remove(path)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
