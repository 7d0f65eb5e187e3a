"""What Linux tells of clocks, temperatures, power, memory and load; each source says which channels it has.

Documentation of the kernel: ``Documentation/ABI/testing/sysfs-devices-system-cpu``, ``sysfs-class-thermal``,
``sysfs-class-hwmon``, ``sysfs-class-powercap``, ``Documentation/filesystems/proc.rst``.
"""

from __future__ import annotations

import abc
import glob
import os
import re
from collections.abc import Callable
from typing import NamedTuple


class Channel(NamedTuple):
    """A series of values.

    Attributes:
        name: In words.
        kind: ``clock``, ``temperature``, ``power``, ``energy``, ``memory``, ``load``, ``throttle``, ``steal`` or
            ``fan``.
        unit: As it is printed.
        source: What tells it.
    """

    name: str
    kind: str
    unit: str
    source: str


class Source(abc.ABC):
    """Channels that are read together.

    Attributes:
        channels: What it has.
        notes: What is there and cannot be read, and why.
    """

    def __init__(self) -> None:
        self.channels: list[Channel] = []
        self.notes: list[str] = []

    @abc.abstractmethod
    def read(self) -> list[float | None]:
        """Return a value of each channel; None where it cannot be told this time."""

    def close(self) -> None:  # noqa: B027 (most have started nothing)
        """End what it has started."""


class Files(Source):
    """Channels that are a file each, holding a number.

    Args:
        files: Channel, path, and what to multiply by.
    """

    def __init__(self, files: list[tuple[Channel, str, float]]) -> None:
        super().__init__()
        self._files: list[tuple[str, float]] = []
        for channel, path, scale in files:
            try:
                number(path)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else "no number"
                self.notes.append(
                    "{}: {} cannot be read ({}: {})".format(channel.source, channel.name, path, reason)
                )
            else:
                self.channels.append(channel)
                self._files.append((path, scale))

    def read(self) -> list[float | None]:
        """Return the numbers, multiplied."""
        values: list[float | None] = []
        for path, scale in self._files:
            try:
                values.append(number(path) * scale)
            except (OSError, ValueError):  # a sensor of a part that was switched off, say
                values.append(None)
        return values


class Counters(Files):
    """Files that count up.

    Args:
        files: Channel, path, and what to multiply by.
        ranges: Where a counter begins again at 0, in its own unit; 0 where it does not.
    """

    def __init__(self, files: list[tuple[Channel, str, float]], ranges: dict[str, float]) -> None:
        super().__init__(files)
        self._ranges = [ranges[path] * scale for path, scale in self._files]
        self._last: list[float | None] = [None] * len(self._files)
        self._sums = [0.0] * len(self._files)

    def read(self) -> list[float | None]:
        """Return what was counted since the first time."""
        values: list[float | None] = []
        for index, value in enumerate(super().read()):
            last = self._last[index]
            if value is None:
                values.append(None)
                continue
            if last is not None:
                self._sums[index] += value - last if value >= last else value - last + self._ranges[index]
            self._last[index] = value
            values.append(self._sums[index])
        return values


class CpuInfo(Source):
    """The clocks in /proc/cpuinfo, where there is no cpufreq and the processor counts its cycles (APERF, MPERF)."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self._path = os.path.join(root, "proc/cpuinfo")
        clocks = self._clocks()
        if re.search(r"^flags\s*:.*\baperfmperf\b", text(self._path), re.MULTILINE):
            self.channels = [Channel("cpu{} clock".format(cpu), "clock", "MHz", "/proc/cpuinfo") for cpu in clocks]
        elif clocks:
            self.notes.append("/proc/cpuinfo: tells the CPUs' nominal clock only, as in most virtual machines")

    def _clocks(self) -> dict[str, float]:
        cpus = re.findall(r"^processor\s*:\s*(\d+)$.*?^cpu MHz\s*:\s*([\d.]+)$", text(self._path), re.M | re.S)
        return {cpu: float(clock) for cpu, clock in cpus}

    def read(self) -> list[float | None]:
        """Return each CPU's."""
        clocks = self._clocks() if self.channels else {}
        return [clocks.get(channel.name[len("cpu") : -len(" clock")]) for channel in self.channels]


class Throttling(Source):
    """How often Intel's CPUs were slowed down for their temperature since the sample before."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self._files: list[list[str]] = []
        self._last: list[list[float]] = []
        for level in ("core", "package"):
            files = by_number(
                root, "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/{}_throttle_count".format(level)
            )
            if files:
                self.channels.append(Channel("CPU {} throttling".format(level), "throttle", "", "thermal_throttle"))
                self._files.append(files)
        self._last = self._counts()

    def _counts(self) -> list[list[float]]:
        return [[number(path) for path in files] for files in self._files]

    def read(self) -> list[float | None]:
        """Return the greatest increase of any CPU's: all CPUs of a package count the same event."""
        last, self._last = self._last, self._counts()
        return [max(b - a for a, b in zip(before, now)) for before, now in zip(last, self._last)]


class Load(Source):
    """What share of all CPUs other processes took, and the hypervisor, since the sample before.

    Args:
        root: Of the file system.
        pid: The process that measures: it and what it has started are not "others".
    """

    def __init__(self, root: str, pid: int) -> None:
        super().__init__()
        self._proc, self._pid = os.path.join(root, "proc"), pid
        self.channels = [
            Channel("load of other processes", "load", "%", "/proc/stat"),
            Channel("time taken by the hypervisor", "steal", "%", "/proc/stat"),
        ]
        self._last: tuple[int, int, int] | None = None

    def _times(self) -> tuple[int, int, int]:
        """Return ticks since boot: in all, of others, stolen."""
        fields = text(os.path.join(self._proc, "stat")).splitlines()[0].split()[1:9]
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields)
        busy = user + nice + system + irq + softirq
        return busy + idle + iowait + steal, busy - self._ours(self._pid), steal

    def _ours(self, pid: int) -> int:
        """Return the ticks of a process and of what it has started, ended or not."""
        folder = os.path.join(self._proc, str(pid))
        after_name = text(os.path.join(folder, "stat")).rpartition(")")[2].split()
        children = [child for path in glob.glob(folder + "/task/*/children") for child in text(path).split()]
        return sum(map(int, after_name[11:15])) + sum(self._ours(int(child)) for child in children)

    def read(self) -> list[float | None]:
        """Return both in percent of all CPUs' time; None the first time, and within a tick of the time before."""
        last, self._last = self._last, self._times()
        if last is None:
            return [None, None]
        total, others, stolen = (now - before for now, before in zip(self._last, last))
        if total <= 0:
            return [None, None]
        return [max(others, 0) / total * 100, stolen / total * 100]


class Memory(Source):
    """The machine's memory that is in use."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self._path = os.path.join(root, "proc/meminfo")
        self.channels = [Channel("memory in use", "memory", "MB", "/proc/meminfo")]

    def read(self) -> list[float | None]:
        """Return all memory less what is available, in megabytes (10^6 bytes)."""
        kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text(self._path), re.MULTILINE))
        return [(int(kilobytes["MemTotal"]) - int(kilobytes["MemAvailable"])) * 1024 / 1e6]


def cpu_clocks(root: str) -> Source:
    """Return each CPU's clock."""
    files = by_number(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    if not files:
        return CpuInfo(root)
    return Files(
        [(Channel("{} clock".format(path.split("/")[-3]), "clock", "MHz", "cpufreq"), path, 1e-3) for path in files]
    )


def thermal_zones(root: str) -> Source:
    """Return the temperatures of the kernel's thermal zones."""
    folders = by_number(root, "sys/class/thermal/thermal_zone[0-9]*")
    types = [text(folder + "/type").strip() for folder in folders]
    names = [t if types.count(t) == 1 else "{} {}".format(t, i) for i, t in enumerate(types)]
    return Files(
        [
            (Channel(name + " temperature", "temperature", "°C", "thermal zone"), folder + "/temp", 1e-3)
            for name, folder in zip(names, folders)
        ]
    )


# Processors whose driver makes no thermal zone of them. Other temperatures are left alone: to read a disk's is
# a command to the disk.
_PROCESSORS = ("coretemp", "k10temp", "zenpower")


def hardware_monitors(root: str) -> Source:
    """Return fans, power meters and processors' temperatures of hwmon."""
    files = []
    for folder in by_number(root, "sys/class/hwmon/hwmon[0-9]*"):
        chip = text(folder + "/name").strip()
        paths = sorted(glob.glob(folder + "/power*_average")) + sorted(glob.glob(folder + "/*_input"))
        for sensor, path in {os.path.basename(path).rpartition("_")[0]: path for path in paths}.items():
            label = text(os.path.join(folder, sensor + "_label")).strip() or sensor
            name = "{} {}".format(chip, label)
            if sensor.startswith("fan"):
                files.append((Channel(name, "fan", "rpm", "hwmon"), path, 1.0))
            elif sensor.startswith("power"):
                files.append((Channel(name + " power", "power", "W", "hwmon"), path, 1e-6))
            elif sensor.startswith("temp") and chip in _PROCESSORS and not label.startswith("Core "):
                files.append((Channel(name + " temperature", "temperature", "°C", "hwmon"), path, 1e-3))
    return Files(files)


def energy_counters(root: str) -> Source:
    """Return the joules that Intel's and AMD's processors have counted (RAPL), since the first sample."""
    files, ranges = [], {}
    for folder in sorted(glob.glob(os.path.join(root, "sys/class/powercap/intel-rapl:*"))):
        name = text(folder + "/name").strip()
        if (
            os.path.basename(folder).count(":") == 2
        ):  # a part of a package: the folder's name begins with the package's
            name = "{} {}".format(text(folder.rpartition(":")[0] + "/name").strip(), name)
        path = folder + "/energy_uj"
        files.append((Channel(name + " energy", "energy", "J", "RAPL"), path, 1e-6))
        ranges[path] = float(text(folder + "/max_energy_range_uj") or 0)
    return Counters(files, ranges)


# the GPU of a Jetson, as its device tree calls it
_TEGRA_GPUS = ("gp10b", "gv11b", "ga10b", "gb10b", "gpu")


def jetson_gpu(root: str) -> Source:
    """Return clock and load of a Jetson's GPU; tegrastats tells the same and more."""
    files = []
    for folder in sorted(glob.glob(os.path.join(root, "sys/class/devfreq/*"))):
        if text(folder + "/device/of_node/name").strip("\0\n") in _TEGRA_GPUS:
            files.append((Channel("GPU clock", "clock", "MHz", "devfreq"), folder + "/cur_freq", 1e-6))
            files.append((Channel("GPU load", "load", "%", "devfreq"), folder + "/device/load", 0.1))
    return Files(files)


KERNEL: tuple[Callable[[str], Source], ...] = (
    cpu_clocks,
    hardware_monitors,
    Throttling,
    Memory,
    energy_counters,
)


def text(path: str) -> str:
    """Return a file's text, or an empty string where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def number(path: str) -> float:
    """Return the number that a file holds."""
    with open(path, encoding="utf-8") as file:
        return float(file.read())


def by_number(root: str, pattern: str) -> list[str]:
    """Return the paths that a pattern finds, cpu2 before cpu10."""
    return sorted(
        glob.glob(os.path.join(root, pattern)), key=lambda path: [int(n) for n in re.findall(r"\d+", path)]
    )
