"""Clocks, temperatures, power and load while something is measured.

A process of its own reads them, since the timed loop may share neither its interpreter nor, where there are others,
its CPUs. It ends when its standard input does, so that it also ends with a process that is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any

from . import nvml, programs, sensors, tegrastats

_NICENESS = 10  # enough to be the one that waits, not so much that it starves
_SECONDS = 30.0  # to the first sample: a driver that nobody uses is loaded first; and from the end to the file
_SAMPLER = (
    "import sys; sys.path.insert(0, sys.argv[1]); from {} import telemetry; telemetry.sample(sys.argv[2])".format(
        (__package__ or "").rpartition(".")[2]
    )
)


@contextlib.contextmanager
def sampled(
    path: str, interval_ms: int = 100, *, avoid: Collection[int] = (), root: str = "/"
) -> Iterator[list[str]]:
    """Sample what the device tells of itself for as long as the block lasts.

    The block begins after the first sample, and the last one is taken after it.

    Args:
        path: Where ``telemetry.json`` goes, whole or not at all: ``interval_ms`` (asked for), ``times_ns``
            (``time.monotonic_ns`` of each sample), ``channels`` (``name``, ``kind``, ``unit``, ``source``, and
            ``values``, one a sample, None where there was none), ``notes``.
        interval_ms: Milliseconds from sample to sample.
        avoid: CPUs that are measured: the sampler keeps off them where there are others.
        root: Of the file system that is read.

    Yields:
        What the user should know; when it broke off, the reason is in it after the block, and no file is there.
    """
    notes: list[str] = []
    asked = {"path": path, "interval_ms": interval_ms, "avoid": list(avoid), "root": root, "pid": os.getpid()}
    code = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with subprocess.Popen(
        [sys.executable, "-c", _SAMPLER, code, json.dumps(asked)],
        stdin=subprocess.PIPE,  # ends when this process does
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the benchmark
    ) as sampler:
        assert sampler.stdout
        try:
            select.select([sampler.stdout], [], [], _SECONDS)
            yield notes
        finally:
            try:
                _, said = sampler.communicate(timeout=_SECONDS)
                if sampler.returncode:
                    reason = said.decode("utf-8", "replace").strip().rpartition("\n")[2]
                    notes.append("telemetry broke off ({}): {}".format(sampler.returncode, reason or "no reason"))
            except subprocess.TimeoutExpired:
                sampler.kill()
                notes.append("telemetry was ended, since it did not end by itself")


def sample(request: str) -> None:
    """Take samples until standard input ends, then write the file; see :func:`sampled` for ``request`` (JSON)."""
    asked = json.loads(request)
    _step_aside(asked["avoid"])
    sources = available(asked["root"], asked["interval_ms"], asked["pid"])
    times, samples = [], []
    due = time.monotonic_ns()
    ended = False
    while True:
        times.append(time.monotonic_ns())
        samples.append([value for source in sources for value in _values(source)])
        if ended:
            break
        if len(times) == 1:
            print("ready", flush=True)
        now = time.monotonic_ns()
        due = max(due + asked["interval_ms"] * 1_000_000, now)  # samples that are late are left out
        ended = bool(select.select([sys.stdin], [], [], (due - now) / 1e9)[0])
    for source in sources:
        source.close()
    channels = [channel for source in sources for channel in source.channels]
    document = {
        "interval_ms": asked["interval_ms"],
        "times_ns": times,
        "channels": [
            dict(channel._asdict(), values=[_rounded(values[index]) for values in samples])
            for index, channel in enumerate(channels)
        ],
        "notes": [note for source in sources for note in source.notes],
    }
    with open(asked["path"] + ".new", "w", encoding="utf-8") as file:
        json.dump(document, file)
    os.replace(asked["path"] + ".new", asked["path"])


def _step_aside(avoid: Collection[int]) -> None:
    os.nice(_NICENESS)
    if avoid:
        others = set(range(os.sysconf("SC_NPROCESSORS_CONF"))) - set(avoid)
        with contextlib.suppress(OSError):  # there are none, or none that may be used
            os.sched_setaffinity(0, others)


def available(root: str, interval_ms: int, pid: int) -> list[sensors.Source]:
    """Return what this device has; ``pid`` is the process that measures."""
    sources = [source(root) for source in sensors.KERNEL]
    sources += [sensors.Load(root, pid), nvml.Gpus()]
    program = programs.find("tegrastats")
    jetson = [tegrastats.Tegrastats(program, interval_ms)] if program else []
    if jetson and jetson[0].channels:
        return sources + jetson  # thermal zones and devfreq would tell the same once more
    return sources + jetson + [sensors.thermal_zones(root), sensors.jetson_gpu(root)]


def _values(source: sensors.Source) -> list[float | None]:
    try:
        return source.read()
    except (OSError, ValueError):
        return [None] * len(source.channels)


def _rounded(value: Any) -> Any:
    return None if value is None else round(value, 3)
