"""The benchmark on the device: latency, throughput, accuracy, memory, load time; raw figures go to the host."""

from __future__ import annotations

import gc
import os
import time
from array import array
from typing import Any, Optional

import numpy as np

from . import engine, facts, releases
from .protocol import progress

_ROTATED = 256  # distinct images that latency and throughput rotate through


def bench(request: dict[str, Any]) -> dict[str, Any]:
    """Measure a release.

    Latency is MLPerf's SingleStream (one query after another, batch 1), throughput its Offline (batches, as
    fast as they go). Accuracy is taken on every image of the evaluation data, with the same session.

    Args:
        request: ``root``, ``release`` (folder), ``out`` (folder for raw data), ``warmup_ms``, ``duration_ms``,
            ``queries`` (at least so many), ``batches``.

    Returns:
        ``accuracy`` (0 to 1, None without labels), ``not_measured`` (the reason for what is None), ``images``,
        ``throughput`` (``batch``, ``samples_per_s`` each), ``load_ms``, ``first_ms``, ``peak_memory_bytes``
        (after latency and throughput), ``provider``. Beside it ``latencies.npy`` (int64 nanoseconds, in order)
        and ``logits.npy`` (float32, ``(N, ...)``).
    """
    with releases.locked(request["root"]):
        folder, out = request["release"], request["out"]
        images = np.load(os.path.join(folder, "evaluation", "images.npy"), mmap_mode="r")
        labels = _labels(folder)
        os.makedirs(out, exist_ok=True)

        started = time.perf_counter_ns()
        session = engine.load(folder)
        loaded = time.perf_counter_ns()
        queries = [np.array(images[i : i + 1]) for i in range(min(_ROTATED, len(images)))]
        first = time.perf_counter_ns()
        session.run(queries[0])
        first = time.perf_counter_ns() - first

        latencies = single_stream(
            session, queries, request["warmup_ms"], request["duration_ms"], request["queries"]
        )
        np.save(os.path.join(out, "latencies.npy"), latencies)
        throughput = [
            {"batch": batch, "samples_per_s": offline(session, queries, batch, request["duration_ms"])}
            for batch in request["batches"]
        ]
        peak = facts.peak_memory()

        logits = evaluate(session, images, max(request["batches"]))
        np.save(os.path.join(out, "logits.npy"), logits)
        return {
            "accuracy": None if labels is None else float((logits.argmax(1) == labels).mean()),
            "not_measured": {"accuracy": "the data have no labels"} if labels is None else {},
            "images": len(images),
            "throughput": throughput,
            "load_ms": (loaded - started) / 1e6,
            "first_ms": first / 1e6,
            "peak_memory_bytes": peak,
            "provider": session.provider,
        }


def _labels(folder: str) -> Optional[np.ndarray]:
    path = os.path.join(folder, "evaluation", "labels.npy")
    return np.load(path) if os.path.exists(path) else None


def single_stream(
    session: engine.Session, queries: list[np.ndarray], warmup: float, duration: float, least: int
) -> np.ndarray:
    """Return the nanoseconds of each query, sent one after another.

    Args:
        session: The engine.
        queries: Images of batch 1, rotated through.
        warmup: Milliseconds before anything counts.
        duration: Milliseconds to measure, at least.
        least: Queries to measure, at least.
    """
    clock, run, count = time.perf_counter_ns, session.run, len(queries)
    turn = 0
    end = clock() + int(warmup * 1e6)
    while clock() < end:
        run(queries[turn % count])
        turn += 1
    taken = array("q")
    keep = taken.append
    shown = clock()
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin = clock()
        end = begin + int(duration * 1e6)
        while True:
            query = queries[turn % count]
            start = clock()
            run(query)
            stop = clock()
            keep(stop - start)
            turn += 1
            if stop >= end and len(taken) >= least:
                break
            if stop - shown > 1_000_000_000:
                progress(int(min((stop - begin) / 1e6, duration)), int(duration), "SingleStream")
                shown = stop
    finally:
        if collecting:
            gc.enable()
    return np.array(taken, np.int64)


def offline(session: engine.Session, queries: list[np.ndarray], batch: int, duration: float) -> float:
    """Return samples per second at a batch size, over ``duration`` milliseconds or three runs at least."""
    pool = np.concatenate(queries)
    batches = [pool.take(range(i * batch, (i + 1) * batch), axis=0, mode="wrap") for i in range(4)]
    progress(0, 1, "Offline, batch {}".format(batch))
    session.run(batches[0])
    done = 0
    start = time.perf_counter_ns()
    end = start + int(duration * 1e6)
    while time.perf_counter_ns() < end or done < 3:
        session.run(batches[done % 4])
        done += 1
    return done * batch / (time.perf_counter_ns() - start) * 1e9


def evaluate(session: engine.Session, images: np.ndarray, batch: int) -> np.ndarray:
    """Return the logits of every image, float32 ``(N, classes)``, in batches that the engine takes."""
    parts = []
    for start in range(0, len(images), batch):
        parts.append(np.asarray(session.run(np.array(images[start : start + batch])), np.float32))
        if start % (batch * 20) == 0:
            progress(start, len(images), "accuracy")
    return np.concatenate(parts)
