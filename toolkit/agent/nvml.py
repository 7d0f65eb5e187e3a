"""NVIDIA's GPUs through NVML, the library that nvidia-smi asks.

Asked directly, since the values then carry the sampler's own times, since it knows the energy counter, which older
versions of nvidia-smi do not print, and since no second process has to be fed and ended. Functions, numbers and
their meaning are those of ``nvml.h``; they are part of the driver's ABI.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from .sensors import Channel, Source

_LIBRARY = "libnvidia-ml.so.1"
_NOT_SUPPORTED = 3
_CLOCK_SM, _CLOCK_MEM = 1, 2
_TEMPERATURE_GPU = 0
# nvmlClocksEventReason...: SwThermalSlowdown and HwThermalSlowdown; SwPowerCap and HwPowerBrakeSlowdown
_THERMAL, _POWER = 0x20 | 0x40, 0x04 | 0x80


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Utilization(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class Gpus(Source):
    """Every GPU that NVML knows; no channels where there is no NVML."""

    def __init__(self) -> None:
        super().__init__()
        self._reads: list[Callable[[], float]] = []
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError:
            return
        count = ctypes.c_uint()
        try:
            self._call("nvmlInit_v2")
            self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
            for index in range(count.value):
                device = ctypes.c_void_p()
                self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
                self._add("GPU" if count.value == 1 else "GPU {}".format(index), device)
        except OSError as error:
            self.notes.append("NVML: {}".format(error.strerror))

    def _call(self, function: str, *arguments: Any) -> None:
        try:
            code = getattr(self._library, function)(*arguments)
        except AttributeError as error:
            raise OSError(_NOT_SUPPORTED, "the driver has no {}".format(function)) from error
        if code != 0:
            describe = self._library.nvmlErrorString
            describe.restype = ctypes.c_char_p
            raise OSError(code, describe(code).decode())

    def _add(self, name: str, device: ctypes.c_void_p) -> None:
        """Add the channels that a GPU has."""

        def ask(function: str, result: Any, *selector: ctypes.c_uint) -> Any:
            self._call(function, device, *selector, ctypes.byref(result))
            return result

        def clock(which: int) -> float:
            return float(ask("nvmlDeviceGetClockInfo", ctypes.c_uint(), ctypes.c_uint(which)).value)

        def temperature() -> float:
            return float(ask("nvmlDeviceGetTemperature", ctypes.c_uint(), ctypes.c_uint(_TEMPERATURE_GPU)).value)

        def slowed_down(reasons: int) -> float:
            # newer drivers call it nvmlDeviceGetCurrentClocksEventReasons, and still have this name
            active = ask("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong()).value
            return float(bool(active & reasons))

        for words, kind, unit, read in (
            ("clock", "clock", "MHz", lambda: clock(_CLOCK_SM)),
            ("memory clock", "clock", "MHz", lambda: clock(_CLOCK_MEM)),
            ("temperature", "temperature", "°C", temperature),
            ("power", "power", "W", lambda: ask("nvmlDeviceGetPowerUsage", ctypes.c_uint()).value / 1e3),
            (
                "energy",
                "energy",
                "J",
                lambda: ask("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong()).value / 1e3,
            ),
            ("memory in use", "memory", "MB", lambda: ask("nvmlDeviceGetMemoryInfo", _Memory()).used / 1e6),
            ("load", "load", "%", lambda: float(ask("nvmlDeviceGetUtilizationRates", _Utilization()).gpu)),
            ("thermal throttling", "throttle", "", lambda: slowed_down(_THERMAL)),
            ("power throttling", "throttle", "", lambda: slowed_down(_POWER)),
            ("fan", "fan", "%", lambda: float(ask("nvmlDeviceGetFanSpeed", ctypes.c_uint()).value)),
        ):
            channel = Channel("{} {}".format(name, words), kind, unit, "NVML")
            try:
                read()
            except OSError as error:
                if error.errno != _NOT_SUPPORTED:
                    self.notes.append("NVML: {} cannot be read ({})".format(channel.name, error.strerror))
                continue
            self.channels.append(channel)
            self._reads.append(read)

    def read(self) -> list[float | None]:
        """Return them; energy is the joules since the driver was loaded, throttling 1 while it lasts."""
        values: list[float | None] = []
        for read in self._reads:
            try:
                values.append(read())
            except OSError:
                values.append(None)
        return values
