"""The loops that time queries, by MLPerf's names; beside the query they read the clock twice and store a number.

All of SingleStream, Offline, the warm-up, the no-op engine and the comparison go through :func:`burst`.
"""

from __future__ import annotations

import itertools
import resource
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Callable

import numpy as np

Query = Callable[[], Any]

_ROTATED = 256  # distinct images that the queries rotate through
_ROTATED_BYTES = 16 << 20  # of large images fewer: they count in the peak memory
_BLOCK = 4096  # queries whose times are stored before room for more is made, between two queries
_OFFLINE_FIRST = 2  # batches that do not count: the first makes room for its size
_OFFLINE_LEAST = 3
_SETTLING = 10  # cycles of DutyCycle before any counts: clocks fall within the first ones


def rotated(images: np.ndarray) -> np.ndarray:
    """Return the images ``(N, 3, S, S)`` that queries rotate through, copied into memory."""
    return np.array(images[: max(1, min(_ROTATED, _ROTATED_BYTES // max(1, images[:1].nbytes)))])


def prepared(session: Any, pool: np.ndarray, batch: int) -> list[Query]:
    """Return a query for each batch that a pool of images holds, at least one."""
    if batch > len(pool):
        pool = pool.take(range(batch), axis=0, mode="wrap")
    return [session.prepare(pool[i : i + batch]) for i in range(0, len(pool) - batch + 1, batch)]


def buffer(size: int = _BLOCK) -> array[int]:
    """Return room for times, written to once, so that the timed path meets no page for the first time."""
    return array("q", bytes(8 * size))


def burst(queries: Iterator[Query], taken: array[int], least: int, until: int) -> int:
    """Send queries one after another and store how long each takes.

    Args:
        queries: Endless.
        taken: Nanoseconds of each query.
        least: Queries to send, at least.
        until: When to stop, of ``time.monotonic_ns()``; a full buffer ends it too.

    Returns:
        How many queries were sent.
    """
    clock = time.monotonic_ns
    for turn in range(len(taken)):
        query = next(queries)
        start = clock()
        query()
        stop = clock()
        taken[turn] = stop - start
        if stop >= until and turn + 1 >= least:
            return turn + 1
    return len(taken)


def paced(queries: Iterator[Query], taken: array[int], period: int) -> tuple[int, int]:
    """Send a query every ``period`` nanoseconds and sleep between; what cannot begin on time begins at once.

    It ends with the last period that ``taken`` has room for, even when not all queries could be sent.

    Returns:
        How many queries were sent, and how many of them late, since the one before was still at work.
    """
    clock, sleep = time.monotonic_ns, time.sleep
    begin = clock()
    late = 0
    for turn in range(len(taken)):
        early = begin + turn * period - clock()
        if early > 0:
            sleep(early / 1e9)
        elif turn:
            late += 1
        query = next(queries)
        start = clock()
        query()
        stop = clock()
        taken[turn] = stop - start
        if stop - begin >= len(taken) * period:
            return turn + 1, late
    return len(taken), late


def run(order: dict[str, Any], queries: Sequence[Query]) -> tuple[dict[str, Any], array[int]]:
    """Run a scenario.

    Args:
        order: ``name``, ``duration_ms``; ``queries`` (at least so many) for SingleStream, ``batch`` for Offline,
            ``period_ms`` for DutyCycle.
        queries: What is sent, in turn; of Offline whole batches.

    Returns:
        ``name``, ``batch``, ``queries`` (how many), ``began_ns``, ``ended_ns``, ``cpu`` (see :func:`_usage`), of
        DutyCycle ``period_ms`` and ``late``; and the nanoseconds of each query, in order.
    """
    duration = int(order["duration_ms"] * 1e6)
    cycle = itertools.cycle(queries)
    entry = {"name": order["name"], "batch": order.get("batch", 1)}
    if order["name"] == "DutyCycle":
        period = int(order["period_ms"] * 1e6)
        taken = buffer(max(1, duration // period))
        paced(cycle, buffer(min(_SETTLING, len(taken))), period)
        began, before = time.monotonic_ns(), _usage()
        sent, late = paced(cycle, taken, period)
        del taken[sent:]
        entry.update(period_ms=order["period_ms"], late=late)
    else:
        least = order["queries"] if order["name"] == "SingleStream" else _OFFLINE_LEAST
        if order["name"] == "Offline":
            burst(cycle, buffer(_OFFLINE_FIRST), _OFFLINE_FIRST, 0)
        taken, block = array("q"), buffer()
        began, before = time.monotonic_ns(), _usage()
        while len(taken) < least or time.monotonic_ns() < began + duration:
            sent = burst(cycle, block, least - len(taken), began + duration)
            taken.extend(block[:sent])
    ended, after = time.monotonic_ns(), _usage()
    cpu = {name: after[name] - before[name] for name in after}
    return dict(entry, queries=len(taken), began_ns=began, ended_ns=ended, cpu=cpu), taken


def overhead() -> dict[str, float]:
    """Return the p50 and p99, in nanoseconds, of an engine that does nothing, through the same loop."""
    taken = buffer(10_000)
    burst(itertools.repeat(lambda: None), taken, len(taken), 0)
    return {"p50": float(np.percentile(taken, 50)), "p99": float(np.percentile(taken, 99))}


def _usage() -> dict[str, float]:
    """Return how often this process was interrupted and had to wait for memory, and what it has computed."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "involuntary_switches": used.ru_nivcsw,
        "major_faults": used.ru_majflt,
        "minor_faults": used.ru_minflt,
        "cpu_ms": (used.ru_utime + used.ru_stime) * 1e3,
    }
