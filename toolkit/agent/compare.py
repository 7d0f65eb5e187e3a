"""Two releases measured against each other in one process: in short bursts, so that both meet the same device."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from array import array
from typing import Any

import numpy as np

from . import conditions, engine, measure, releases, scenarios, tuning, warmup
from .protocol import Refusal, progress

_BURST = 20_000_000  # nanoseconds of SingleStream
_LEAST = 5  # queries a burst: the first ones find the other engine's weights in the caches
_CYCLES = 10  # of DutyCycle a burst
_SIDES = ("a", "b")


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """Measure two releases in turns; the host asks several times and does the statistics.

    Which is loaded first and which begins each group of four bursts (A B B A, or B A A B) is random, so that
    neither order nor a drift of the device favours one.

    Args:
        request: ``root``, ``releases`` (the folders of a and b), ``out`` (folder for raw data), ``warmup_ms``
            (limit for each), ``duration_ms``, ``period_ms`` (of DutyCycle; None for SingleStream), ``seed``,
            ``tuning``.

    Returns:
        ``bursts`` (how many), and of a and b: ``queries``, ``load_ms``, ``warmup``; ``conditions``, ``tuning``,
        ``notes``. Beside it ``a.npy`` and ``b.npy`` (int64 nanoseconds, one value a query, in order) and
        ``bursts.npy`` (int64 ``(K, 3)``: 0 for a or 1 for b, where in its file the burst begins, queries).

    Raises:
        Refusal: One of them does not load or run, or only trtexec can run it.
    """
    root, folders = request["root"], request["releases"]
    with releases.locked(root):
        tuning.recover(root)
        os.makedirs(request["out"], exist_ok=True)
        descriptions = [engine.read(folder, root) for folder in folders]
        if not all(measure.can_run(description) for description in descriptions):
            raise Refusal(
                "two engines share one process only where Python runs them, and here trtexec does",
                "install TensorRT's Python bindings and cuda-python on the device",
            )
        with tuning.applied(root, request["tuning"]) as tuned:
            return dict(_taking_turns(request, descriptions), tuning=tuned)


def _taking_turns(request: dict[str, Any], descriptions: list[dict[str, Any]]) -> dict[str, Any]:
    chance = random.Random(request["seed"])
    sessions: dict[int, Any] = {}
    load_ms: dict[int, float] = {}
    queries: dict[int, list[scenarios.Query]] = {}
    with contextlib.ExitStack() as opened:
        for side in chance.sample((0, 1), 2):
            folder = request["releases"][side]
            pool = scenarios.rotated(np.load(os.path.join(folder, "evaluation", "images.npy"), mmap_mode="r"))
            begin = time.monotonic_ns()
            session = engine.open_session(folder, descriptions[side], request["root"])
            load_ms[side] = (time.monotonic_ns() - begin) / 1e6
            sessions[side] = opened.enter_context(contextlib.closing(session))
            queries[side] = scenarios.prepared(session, pool, 1)
        threads = [session.threads for session in sessions.values()]
        with conditions.quiet(None if None in threads else max(threads)) as held:
            progress(0, 0, "warming up")
            warmed = {
                side: warmup.until_steady(itertools.cycle(queries[side]), request["warmup_ms"]) for side in queries
            }
            taken, bursts = in_turns((queries[0], queries[1]), request["duration_ms"], request["period_ms"], chance)
    for side, name in enumerate(_SIDES):
        np.save(os.path.join(request["out"], name + ".npy"), taken[side])
    np.save(os.path.join(request["out"], "bursts.npy"), bursts)
    return {
        "bursts": len(bursts),
        "queries": [len(times) for times in taken],
        "load_ms": [load_ms[0], load_ms[1]],
        "warmup": [warmed[0], warmed[1]],
        "conditions": held,
        "notes": ["{}: {}".format(name, note) for side, name in enumerate(_SIDES) for note in sessions[side].notes],
    }


def in_turns(
    queries: tuple[list[scenarios.Query], list[scenarios.Query]],
    duration_ms: float,
    period_ms: float | None,
    chance: random.Random,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Send bursts of two engines' queries in groups of four for ``duration_ms``.

    Returns:
        The nanoseconds of a's and of b's queries (int64), and the bursts (int64 ``(K, 3)``).
    """
    clock = time.monotonic_ns
    cycles = [itertools.cycle(side) for side in queries]
    taken: tuple[array[int], array[int]] = (array("q"), array("q"))
    bursts = []
    block = scenarios.buffer(_CYCLES) if period_ms else scenarios.buffer()
    begin = shown = clock()
    while clock() - begin < duration_ms * 1e6:
        first = chance.randrange(2)
        for side in (first, 1 - first, 1 - first, first):
            if period_ms:
                sent, _ = scenarios.paced(cycles[side], block, int(period_ms * 1e6))
            else:
                sent = scenarios.burst(cycles[side], block, _LEAST, clock() + _BURST)
            bursts.append((side, len(taken[side]), sent))
            taken[side].extend(block[:sent])
        if clock() - shown > 1_000_000_000:
            shown = clock()
            progress(int((shown - begin) / 1e6), int(duration_ms), "comparing")
    return [np.array(times, np.int64) for times in taken], np.array(bursts, np.int64)
