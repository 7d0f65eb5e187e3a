"""The knobs of a device: each reads what it is set to, says that in words, sets it, and sets it back.

How the programs answer was read in NVIDIA's ``jetson_clocks`` (the scripts of L4T 32 and 35), in nvidia-smi(1), and
in what ``nvpmodel`` and ``nvidia-smi`` were seen to print by others: it was not run on NVIDIA's hardware yet.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from typing import Any, Protocol

from .jetson import JetsonClocks, PowerMode
from .programs import Root, ask, find, program, reason
from .protocol import Refusal

_GOVERNORS = "/sys/devices/system/cpu/cpufreq/policy*/scaling_governor"


class Knob(Protocol):
    """A setting of the device.

    Attributes:
        name: In words.
        lasting: Whether it survives a reboot.
    """

    name: str
    lasting: bool

    @property
    def wanted(self) -> str:
        """What ``show`` is to say once it is set; empty where it is only kept, since another knob moves it."""

    def read(self) -> Any:
        """Return what it is set to, as JSON, or None where the device does not tell."""

    def show(self, state: Any) -> str:
        """Say in a few words what was read."""

    def write(self) -> None:
        """Set it."""

    def reset(self, found: Any) -> None:
        """Set it back to what was read."""


class Persistence:
    """Whether NVIDIA's driver stays loaded while nobody uses it; clocks that were set are lost when it goes."""

    name = "persistence mode"
    lasting = False
    wanted = "Enabled"

    def __init__(self, root: Root) -> None:
        self._root = root
        self._program = program("nvidia-smi")
        root.rights.append("{} -i [0-9] -pm [01]".format(self._program))

    def read(self) -> dict[str, str]:
        """Return each GPU's."""
        return dict(_query("persistence_mode"))

    def show(self, state: dict[str, str]) -> str:
        """Return ``Enabled`` or ``Disabled``, or both."""
        return _distinct(state)

    def write(self) -> None:
        """Have the driver stay."""
        self.reset(dict.fromkeys(self.read(), self.wanted))

    def reset(self, found: dict[str, str]) -> None:
        """Set each GPU's back."""
        for gpu, mode in found.items():
            self._root.run(self._program, "-i", gpu, "-pm", "1" if mode == "Enabled" else "0")


class ApplicationClocks:
    """The memory and graphics clocks of GPUs whose driver still has application clocks: ``5001,1590 MHz``."""

    name = "application clocks"
    lasting = False

    def __init__(self, root: Root) -> None:
        self._root = root
        self._program = program("nvidia-smi")
        for clocks in (self.read(), self._most()):
            for gpu, pair in clocks.items():
                root.rights.append("{} -i {} -ac {}".format(self._program, gpu, pair.replace(",", "\\,")))
        root.rights += ["{} -i {} -rac".format(self._program, gpu) for gpu in self.read()]

    def _clocks(self, prefix: str) -> dict[str, str]:
        rows = _query("{0}.memory,{0}.graphics".format(prefix))
        return {gpu: memory + "," + graphics for gpu, memory, graphics in rows if graphics.isdigit()}

    def _most(self) -> dict[str, str]:
        there = self.read()
        return {gpu: pair for gpu, pair in self._clocks("clocks.max").items() if gpu in there}

    @property
    def wanted(self) -> str:
        """The highest."""
        return self.show(self._most())

    def read(self) -> dict[str, str]:
        """Return ``MEMORY,GRAPHICS`` in MHz of each GPU that has them."""
        return self._clocks("clocks.applications")

    def show(self, state: dict[str, str]) -> str:
        """Return them with their unit."""
        return _distinct(state) + " MHz"

    def write(self) -> None:
        """Set the highest."""
        for gpu, pair in self._most().items():
            self._root.run(self._program, "-i", gpu, "-ac", pair)

    def reset(self, found: dict[str, str]) -> None:
        """Set them back; what is the default is reset to it, since only then may the GPU boost above it again."""
        default = self._clocks("clocks.default_applications")
        for gpu, pair in found.items():
            back = ("-rac",) if pair == default.get(gpu) else ("-ac", pair)
            self._root.run(self._program, "-i", gpu, *back)


class LockedClocks:
    """The graphics clock of GPUs without application clocks; the driver tells nobody what it is locked at."""

    name = "GPU clocks"
    lasting = False

    def __init__(self, root: Root) -> None:
        self._root = root
        self._program = program("nvidia-smi")
        self._locked: dict[str, str] | None = None
        for gpu, most in self._most().items():
            command = "{} -i {} ".format(self._program, gpu)
            root.rights += [command + "-lgc {0}\\,{0}".format(most), command + "-rgc"]

    def _most(self) -> dict[str, str]:
        rows = _query("clocks.applications.graphics,clocks.max.graphics")
        return {gpu: most for gpu, application, most in rows if most.isdigit() and not application.isdigit()}

    @property
    def wanted(self) -> str:
        """The highest."""
        return self.show(self._most())

    def read(self) -> dict[str, str] | None:
        """Return what the driver has confirmed to this process, in MHz; None before that."""
        return self._locked

    def show(self, state: dict[str, str] | None) -> str:
        """Return it with its unit."""
        return "unknown" if state is None else _distinct(state) + " MHz"

    def write(self) -> None:
        """Lock it at the highest."""
        locked = {}
        for gpu, most in self._most().items():
            said = self._root.run(self._program, "-i", gpu, "-lgc", "{0},{0}".format(most))
            confirmed = re.search(r"gpuClkMin (\d+), gpuClkMax \1\)", said)
            locked[gpu] = confirmed.group(1) if confirmed else reason(said)
        self._locked = locked

    def reset(self, found: None) -> None:
        """Unlock it: a lock from before cannot be read, and is gone."""
        for gpu in self._most():
            self._root.run(self._program, "-i", gpu, "-rgc")
        self._locked = None


class Governor:
    """What chooses the frequency of the CPUs, in every policy of cpufreq."""

    name = "CPU governor"
    lasting = False
    wanted = "performance"

    def __init__(self, root: Root) -> None:
        self._root = root
        self._program = program("tee")
        for digits in ("[0-9]", "[0-9][0-9]", "[0-9][0-9][0-9]"):
            root.rights.append("{} {}".format(self._program, _GOVERNORS.replace("*", digits)))

    def read(self) -> dict[str, str]:
        """Return each policy's, by its file."""
        found = {}
        for path in sorted(glob.glob(_GOVERNORS)):
            with open(path, encoding="utf-8") as file:
                found[path] = file.read().strip()
        return found

    def show(self, state: dict[str, str]) -> str:
        """Return the governors' names."""
        return _distinct(state)

    def write(self) -> None:
        """Set the one that keeps the highest frequency."""
        self.reset(dict.fromkeys(self.read(), self.wanted))

    def reset(self, found: dict[str, str]) -> None:
        """Set each policy's back."""
        for path, governor in found.items():
            self._root.run(self._program, path, text=governor)


KNOBS: dict[str, Callable[[Root], Knob]] = {
    knob.name: knob for knob in (PowerMode, JetsonClocks, Persistence, ApplicationClocks, LockedClocks, Governor)
}


def chosen(root: Root, power_mode: str | None, clocks: str | None) -> list[Knob]:
    """Return the knobs to set, in that order: a power mode limits the clocks.

    Args:
        root: Runs them.
        power_mode: Name or number; None leaves it as it is.
        clocks: ``locked``; None leaves them as they are.

    Raises:
        Refusal: The device has no such thing.
    """
    if (power_mode or clocks) and os.environ.get("TOOLKIT_IMAGE"):
        raise Refusal(
            "power mode and clocks cannot be set from inside a container",
            "leave out power_mode and clocks in the target file, and set them on the machine before the run",
        )
    knobs: list[Knob] = []
    if power_mode is not None:
        if find("nvpmodel") is None:
            raise Refusal(
                "the device has no power modes: nvpmodel is not there", "leave out power_mode in the target file"
            )
        knobs.append(PowerMode(root, power_mode))
        if clocks is None and find("jetson_clocks") is not None:  # a power mode brings clocks of its own
            knobs.append(JetsonClocks(root, ""))
    if clocks is not None:
        knobs += _clocks(root)
    return knobs


def _clocks(root: Root) -> list[Knob]:
    if find("jetson_clocks") is not None:
        return [JetsonClocks(root)]
    knobs: list[Knob] = []
    gpus = _query("clocks.applications.graphics") if find("nvidia-smi") else []
    if gpus:
        knobs.append(Persistence(root))
    if any(clock.isdigit() for _, clock in gpus):
        knobs.append(ApplicationClocks(root))
    if any(not clock.isdigit() for _, clock in gpus):
        knobs.append(LockedClocks(root))
    if glob.glob(_GOVERNORS):
        knobs.append(Governor(root))
    if not knobs:
        raise Refusal("the device has no clocks that can be locked", "leave out clocks in the target file")
    return knobs


def _query(fields: str) -> list[list[str]]:
    """Return the index and some fields of each GPU; none where nvidia-smi fails."""
    command = "--query-gpu=index," + fields
    code, said = ask(program("nvidia-smi"), command, "--format=csv,noheader,nounits")
    return [[field.strip() for field in line.split(",")] for line in said.splitlines()] if code == 0 else []


def _distinct(state: dict[str, str]) -> str:
    return " and ".join(sorted(set(state.values())))
