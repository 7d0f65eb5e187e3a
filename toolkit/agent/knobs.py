"""The knobs of a device: each reads what it is set to, says that in words, sets it, and sets it back.

How the programs answer was read in NVIDIA's ``jetson_clocks`` (the scripts of L4T 32 and 35), in nvidia-smi(1), and
in what ``nvpmodel`` and ``nvidia-smi`` were seen to print by others: it was not run on NVIDIA's hardware yet.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, Protocol

from .protocol import Refusal

_SYSTEM = ":/usr/sbin:/sbin"  # where a user's PATH does not lead on every distribution
_SECONDS = 60.0
_GOVERNORS = "/sys/devices/system/cpu/cpufreq/policy*/scaling_governor"
# nvidia-smi goes on after some of them and ends with 0, as jetson_clocks always does
_ERROR = re.compile(
    r"^(?:NVPM ERROR|Error\b|(?:Setting|Changing) .* is not supported"
    r"|.* does not have permission|.* has been deprecated)",
    re.MULTILINE,
)


class Root:
    """Runs what root alone may run: as this user, or through ``sudo -n`` where the target file allows it.

    Args:
        folder: Where programs run; a name without a folder is one in it, so that a rule of sudoers can name it.
        sudo: Whether sudo may be used.
    """

    def __init__(self, folder: str, sudo: bool) -> None:
        self.folder = folder
        self.rights: list[str] = []  # what the knobs run, as sudoers spells it
        self._sudo = sudo

    def run(self, *argv: str, text: str = "") -> str:
        """Run a program and return what it says.

        Raises:
            Refusal: It fails, or says that it did.
        """
        code, said = self.ask(*argv, text=text)
        if code != 0 or _ERROR.search(said):
            raise Refusal(
                "{} does not work: {}".format(shlex.join(argv), _reason(said)), "try it there by hand, as root"
            )
        return said

    def ask(self, *argv: str, text: str = "") -> tuple[int, str]:
        """Run a program and return its exit status and what it says.

        Raises:
            Refusal: This user may not run it.
        """
        if os.geteuid() == 0:
            return _ask(*argv, text=text, folder=self.folder)
        rule = "{} ALL=(root) NOPASSWD: {}".format(pwd.getpwuid(os.getuid()).pw_name, ", ".join(self.rights))
        remedy = "put this line into /etc/sudoers.d/toolkit there, with sudo visudo -f: {}".format(rule)
        if not self._sudo:
            raise Refusal(
                "power mode and clocks are set by root, which this user is not",
                "set sudo: true in the target file, and {}".format(remedy),
            )
        # -k: a password that was typed before must not count, since it may be forgotten when all is set back
        code, said = _ask("sudo", "-k", "-n", *argv, text=text, folder=self.folder)
        if code != 0 and _reason(said).lower().startswith(("sudo:", "sorry, user")):
            raise Refusal("sudo does not run {}: {}".format(shlex.join(argv), _reason(said)), remedy)
        return code, said


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
        self._program = _program("nvpmodel")
        root.rights.append("{} -m [0-9]".format(self._program))

    @property
    def wanted(self) -> str:
        """Name of the mode; refuses one that the device does not have."""
        return self._mode()[1]

    def _mode(self) -> tuple[str, str]:
        said = _ask(self._program, "-p", "--verbose")[1]
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
        said = _ask(self._program, "-q")[1]
        found = re.search(r"NV Power Mode: *(\S+)\s+(\d+)", said)
        if found is None:
            raise Refusal("nvpmodel does not tell the power mode: {}".format(_reason(said)), "nvpmodel -q there")
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
            raise Refusal("nvpmodel does not set {}: {}".format(name, _reason(said)), "try it there by hand")


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
        self._program = _program("jetson_clocks")
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


class Persistence:
    """Whether NVIDIA's driver stays loaded while nobody uses it; clocks that were set are lost when it goes."""

    name = "persistence mode"
    lasting = False
    wanted = "Enabled"

    def __init__(self, root: Root) -> None:
        self._root = root
        self._program = _program("nvidia-smi")
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
        self._program = _program("nvidia-smi")
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
        self._program = _program("nvidia-smi")
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
            locked[gpu] = confirmed.group(1) if confirmed else _reason(said)
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
        self._program = _program("tee")
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
        if _find("nvpmodel") is None:
            raise Refusal(
                "the device has no power modes: nvpmodel is not there", "leave out power_mode in the target file"
            )
        knobs.append(PowerMode(root, power_mode))
        if clocks is None and _find("jetson_clocks") is not None:  # a power mode brings clocks of its own
            knobs.append(JetsonClocks(root, ""))
    if clocks is not None:
        knobs += _clocks(root)
    return knobs


def _clocks(root: Root) -> list[Knob]:
    if _find("jetson_clocks") is not None:
        return [JetsonClocks(root)]
    knobs: list[Knob] = []
    gpus = _query("clocks.applications.graphics") if _find("nvidia-smi") else []
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


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + _SYSTEM)


def _program(name: str) -> str:
    path = _find(name)
    if path is None:
        raise Refusal("{} is not there any more".format(name), "install it again")
    return path


def _ask(*argv: str, text: str = "", folder: str | None = None) -> tuple[int, str]:
    """Run a program and return its exit status and what it says."""
    try:
        done = subprocess.run(
            argv,
            input=text.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS,
            cwd=folder,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Refusal(
            "{} did not end within {:g} s".format(shlex.join(argv), _SECONDS), "look at the device's load"
        ) from error
    except FileNotFoundError as error:
        raise Refusal("{} is not there".format(argv[0]), "install it, or log in as root") from error
    return done.returncode, done.stdout.decode("utf-8", "replace")


def _query(fields: str) -> list[list[str]]:
    """Return the index and some fields of each GPU; none where nvidia-smi fails."""
    command = "--query-gpu=index," + fields
    code, said = _ask(_program("nvidia-smi"), command, "--format=csv,noheader,nounits")
    return [[field.strip() for field in line.split(",")] for line in said.splitlines()] if code == 0 else []


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line) or line.startswith("sudo:")]
    return (errors or lines or ["it says nothing"])[-1]


def _distinct(state: dict[str, str]) -> str:
    return " and ".join(sorted(set(state.values())))


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
