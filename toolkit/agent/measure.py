"""The benchmark on the device: latency, throughput, accuracy, memory, load time; raw figures go to the host."""

from __future__ import annotations

import gc
import os
import time
from array import array
from importlib import util
from typing import Any

import numpy as np

from . import cuda, engine, facts, releases, trtexec, tuning
from .protocol import Refusal, progress

_ROTATED = 256  # distinct images that latency and throughput rotate through


def bench(request: dict[str, Any]) -> dict[str, Any]:
    """Measure a release.

    Latency is MLPerf's SingleStream (one query after another, batch 1), throughput its Offline (batches, as
    fast as they go). Accuracy is taken on every image of the evaluation data, with the same session.

    Args:
        request: ``root``, ``release`` (folder), ``out`` (folder for raw data), ``warmup_ms``, ``duration_ms``,
            ``queries`` (at least so many), ``batches``, ``tuning`` (see :func:`tuning.applied`).

    Returns:
        ``accuracy`` (0 to 1, or None), ``not_measured`` (what could not be, and why), ``images``, ``throughput``
        (``batch``, ``samples_per_s`` each), ``load_ms``, ``first_ms``, ``peak_memory_bytes`` (after latency and
        throughput), ``provider``, ``settings``, ``layers``, ``notes``, ``tuning`` (what was
        ``set``, and what was ``found``). Beside it ``latencies.npy`` (int64 nanoseconds, in order) and
        ``logits.npy`` (float32, ``(N, classes)``; absent when it was not measured).
    """
    with releases.locked(request["root"]):
        tuning.recover(request["root"])
        os.makedirs(request["out"], exist_ok=True)
        description = engine.read(request["release"], request["root"])
        with tuning.applied(request["root"], request["tuning"]) as tuned:
            if description["runtime"] == "tensorrt" and not can_run_plans():
                result = _with_trtexec(request, description)
            else:
                result = _with_session(request)
        return dict(result, tuning=tuned)


def _with_session(request: dict[str, Any]) -> dict[str, Any]:
    folder, out = request["release"], request["out"]
    images = np.load(os.path.join(folder, "evaluation", "images.npy"), mmap_mode="r")
    started = time.perf_counter_ns()
    session = engine.load(folder, request["root"])
    loaded = time.perf_counter_ns()
    queries = [np.array(images[i : i + 1]) for i in range(min(_ROTATED, len(images)))]
    first = time.perf_counter_ns()
    session.run(queries[0])
    first = time.perf_counter_ns() - first

    latencies = single_stream(session, queries, request["warmup_ms"], request["duration_ms"], request["queries"])
    np.save(os.path.join(out, "latencies.npy"), latencies)
    throughput = [
        {"batch": batch, "samples_per_s": offline(session, queries, batch, request["duration_ms"])}
        for batch in request["batches"]
        if batch <= session.max_batch
    ]
    peak = facts.peak_memory()

    logits = evaluate(session, images)
    np.save(os.path.join(out, "logits.npy"), logits)
    session.close()
    accuracy, not_measured = None, {"accuracy": "the data have no labels"}
    if os.path.exists(os.path.join(folder, "evaluation", "labels.npy")):
        labels = np.load(os.path.join(folder, "evaluation", "labels.npy"))
        accuracy, not_measured = float((logits.argmax(1) == labels).mean()), {}
    return {
        "accuracy": accuracy,
        "not_measured": not_measured,
        "images": len(images),
        "throughput": throughput,
        "load_ms": (loaded - started) / 1e6,
        "first_ms": first / 1e6,
        "peak_memory_bytes": peak,
        "provider": session.provider,
        "settings": session.settings,
        "layers": session.layers,
        "notes": session.notes,
    }


def can_run_plans() -> bool:
    """Tell whether Python can run a TensorRT plan here."""
    return util.find_spec("tensorrt") is not None and cuda.available()


def _with_trtexec(request: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """Measure latency and throughput with trtexec, where Python cannot run a plan; accuracy it cannot measure."""
    largest = description["batches"]["max"] if description["batches"] else 1
    measured = [
        (
            batch,
            time_plan(
                request["release"],
                description,
                batch=batch,
                warmup_ms=request["warmup_ms"],
                duration_ms=request["duration_ms"],
                queries=request["queries"],
            ),
        )
        for batch in sorted({1, *request["batches"]})
        if batch <= largest
    ]
    single = measured[0][1]
    np.save(os.path.join(request["out"], "latencies.npy"), np.array(single["latencies"], np.int64))
    why = "trtexec measures latency only; accuracy needs TensorRT's Python bindings and cuda-python on the device"
    return {
        "accuracy": None,
        "not_measured": {"accuracy": why, "peak memory": why},
        "images": 0,
        "throughput": [
            {"batch": batch, "samples_per_s": result["samples_per_s"]}
            for batch, result in measured
            if batch in request["batches"]
        ],
        "load_ms": None,
        "first_ms": None,
        "peak_memory_bytes": None,
        "provider": description["provider"] + " through trtexec",
        "settings": single["settings"],
        "layers": description["layers"],
        "notes": [why],
    }


def time_plan(release: str, description: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Run a release's plan with trtexec; see :func:`trtexec.latency`, which also says what ``settings`` are.

    Raises:
        Refusal: There is no trtexec, or it cannot run the plan.
    """
    program = trtexec.find()
    if program is None:
        raise Refusal(
            "the device can run no TensorRT engine: it lacks its Python bindings, or CUDA's, and trtexec",
            "apt-get install python3-libnvinfer libnvinfer-bin, and python3 -m pip install cuda-python",
        )
    return trtexec.latency(
        program,
        os.path.join(release, description["file"]),
        network_input=description["input"],
        dynamic=description["batches"] is not None,
        **settings,
    )


def single_stream(
    session: Any, queries: list[np.ndarray], warmup: float, duration: float, least: int
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


def offline(session: Any, queries: list[np.ndarray], batch: int, duration: float) -> float:
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


def evaluate(session: Any, images: np.ndarray) -> np.ndarray:
    """Return the logits of every image, float32 ``(N, classes)``."""
    batch = min(64, session.max_batch)
    parts = []
    for start in range(0, len(images), batch):
        parts.append(np.asarray(session.run(np.array(images[start : start + batch])), np.float32))
        if start % (batch * 20) == 0:
            progress(start, len(images), "accuracy")
    return np.concatenate(parts)
