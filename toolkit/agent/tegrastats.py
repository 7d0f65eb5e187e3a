"""A Jetson's tegrastats: what a line of it says, and the process that prints them.

Lines as JetPack 5, 6 and 7 print them; fields come and go between boards and releases:

    RAM 3162/7620MB CPU [1%@1510,off] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[305] cpu@50.031C VDD_IN 4952mW/4952mW
    RAM 3429/125749MB CPU [0%,5%]@2601 EMC_FREQ @4266 GR3D_FREQ @[1574,1574] gpu@51.2C/51.2C VIN 28906mW/14453mW
"""

from __future__ import annotations

import os
import re
import select
import subprocess

from .sensors import Channel, Source

_SECONDS = 3.0  # to the first line
_OFF = -256.0  # degrees of a sensor whose part is off
_ENGINES = re.compile(r"\b(GR3D|EMC)_FREQ (?:(\d+)%)?(?:@\[?([\d,]+))?")
_NAMES = {"GR3D": "GPU", "EMC": "memory"}
_TEMPERATURE = re.compile(r"\b(\w+)@(-?\d+(?:\.\d+)?)C\b")
_POWER = re.compile(r"\b(\w+) (\d+)mW/")


def parse(line: str) -> dict[Channel, float]:
    """Return what a line says; the clock of several clusters is the highest, power that of now, not the mean."""

    def channel(name: str, kind: str, unit: str) -> Channel:
        return Channel(name, kind, unit, "tegrastats")

    values = {}
    for engine, load, clocks in _ENGINES.findall(line):
        if load:
            values[channel(_NAMES[engine] + " load", "load", "%")] = float(load)
        if clocks:
            values[channel(_NAMES[engine] + " clock", "clock", "MHz")] = max(
                map(float, clocks.strip(",").split(","))
            )
    for sensor, degrees in _TEMPERATURE.findall(line):
        if float(degrees) > _OFF:
            values[channel(sensor + " temperature", "temperature", "°C")] = float(degrees)
    for rail, milliwatts in _POWER.findall(line):
        if rail != "NC":  # not connected
            values[channel(rail + " power", "power", "W")] = int(milliwatts) / 1e3
    return values


class Tegrastats(Source):
    """The process; its first line says which channels there are.

    Args:
        program: Its path.
        interval_ms: How often it prints.
    """

    def __init__(self, program: str, interval_ms: int) -> None:
        super().__init__()
        self._rest = b""
        self._latest: dict[Channel, float] = {}
        self._process = subprocess.Popen(
            [program, "--interval", str(interval_ms)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self._process.stdout
        self._pipe = self._process.stdout.fileno()
        os.set_blocking(self._pipe, False)
        select.select([self._pipe], [], [], _SECONDS)
        lines = [line for line in self._lines() if line] or ["it says nothing"]
        self._latest = parse(lines[-1])
        self.channels = list(self._latest)
        if not self.channels:
            self.notes.append("tegrastats: {}".format(lines[-1]))

    def _lines(self) -> list[str]:
        """Return the lines that it has printed since the last time."""
        try:
            while True:
                more = os.read(self._pipe, 65536)
                if not more:
                    self._latest = {}  # it has ended
                    break
                self._rest += more
        except BlockingIOError:
            pass
        lines, _, self._rest = self._rest.rpartition(b"\n")
        return lines.decode("utf-8", "replace").splitlines()

    def read(self) -> list[float | None]:
        """Return what its latest line says."""
        for line in self._lines()[-1:]:
            self._latest = parse(line)
        return [self._latest.get(channel) for channel in self.channels]

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
