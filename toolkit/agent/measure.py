"""The benchmark on the device: one round of scenarios; raw figures go to the host, which does the statistics."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from array import array
from importlib import util
from typing import Any

import numpy as np

from . import (
    conditions,
    cuda,
    engine,
    facts,
    layers,
    profiles,
    releases,
    scenarios,
    telemetry,
    trtexec,
    tuning,
    warmup,
)
from .protocol import Refusal, progress

_FOR_LOGITS = (
    "trtexec measures latency only; accuracy needs TensorRT's Python bindings and cuda-python on the device"
)
_TRTEXEC_WARMUP_MS = 1000
_TELEMETRY = "telemetry.json"
_NO_PROFILE: dict[str, Any] = {"layers": None, "ran": None, "notes": []}


def bench(request: dict[str, Any]) -> dict[str, Any]:
    """Measure a release once, in this process.

    Args:
        request: ``root``, ``release`` (folder), ``out`` (folder for raw data), ``warmup_ms`` (limit of the
            warm-up), ``scenarios`` (see :func:`scenarios.run`), ``evaluate`` (whether to compute the logits of
            every image), ``profile`` (whether to time the layers), ``tuning`` (see :func:`tuning.applied`).

    Returns:
        ``scenarios`` (a list, with the ``file`` of each), ``warmup``, ``load_ms`` (from nothing to a session, the
        runtime's import included), ``first_ms``, ``overhead_ns`` (of an engine that does nothing),
        ``peak_memory_bytes`` (after the scenarios), ``provider``, ``settings``, ``layers``, ``notes``,
        ``conditions``, ``ran``, ``telemetry``, ``profile``, ``images``, ``not_measured`` (what could not be, and
        why), ``tuning`` (what was ``set``, and what was ``found``). Beside it the raw files: int64 nanoseconds, one
        value a query, in order; and ``logits.npy``, float32 ``(N, classes)``.

    Raises:
        Refusal: The engine does not load or run, or runs otherwise than asked for.
    """
    with releases.locked(request["root"]):
        tuning.recover(request["root"])
        os.makedirs(request["out"], exist_ok=True)
        description = engine.read(request["release"], request["root"])
        with tuning.applied(request["root"], request["tuning"]) as tuned:
            measured = _with_session if can_run(description) else _with_trtexec
            return dict(measured(request, description), tuning=tuned)


def can_run(description: dict[str, Any]) -> bool:
    """Tell whether Python can run an engine here; otherwise it is a plan, and trtexec has to."""
    return description["runtime"] != "tensorrt" or (util.find_spec("tensorrt") is not None and cuda.available())


def _with_session(request: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    folder, out = request["release"], request["out"]
    images = np.load(os.path.join(folder, "evaluation", "images.npy"), mmap_mode="r")
    pool = scenarios.rotated(images)
    begin = time.monotonic_ns()
    session = engine.open_session(folder, description, request["root"])
    loaded = time.monotonic_ns()
    with contextlib.closing(session):
        session.run(pool[:1])
        first = time.monotonic_ns()
        not_measured = {}
        entries = []
        singles = scenarios.prepared(session, pool, 1)
        own = conditions.own_cpus(session.threads) or ()
        sampled = telemetry.sampled(os.path.join(out, _TELEMETRY), avoid=own)
        with sampled as notes, conditions.quiet(session.threads) as held:
            overhead = scenarios.overhead()
            progress(0, 0, "warming up")
            warmed = warmup.until_steady(itertools.cycle(singles), request["warmup_ms"])
            for order in request["scenarios"]:
                name, batch = _named(order), order.get("batch", 1)
                if batch > session.max_batch:
                    not_measured[name] = "the engine takes batches of {} at most".format(session.max_batch)
                    continue
                progress(0, 0, "{}, {:g} s".format(name, order["duration_ms"] / 1000))
                queries = singles if batch == 1 else scenarios.prepared(session, pool, batch)
                entry, taken = scenarios.run(order, queries)
                entries.append(dict(entry, file=_keep(out, name, taken)))
        peak = facts.peak_memory()
        if request["evaluate"]:
            np.save(os.path.join(out, "logits.npy"), evaluate(session, images))
        profile = profiles.layers(folder, description, session, pool) if request["profile"] else _NO_PROFILE
        return {
            "scenarios": entries,
            "warmup": warmed,
            "load_ms": (loaded - begin) / 1e6,
            "first_ms": (first - loaded) / 1e6,
            "overhead_ns": overhead,
            "peak_memory_bytes": peak,
            "provider": session.provider,
            "settings": session.settings,
            "layers": session.layers,
            "notes": session.notes + notes + profile["notes"],
            "conditions": held,
            "ran": _ran(description, session.provider, session.threads, session.layers, profile["ran"]),
            "telemetry": _written(out),
            "profile": profile["layers"],
            "images": len(images),
            "not_measured": not_measured,
        }


def _named(order: dict[str, Any]) -> str:
    return "Offline-{}".format(order["batch"]) if order["name"] == "Offline" else str(order["name"])


def _keep(out: str, name: str, taken: array[int]) -> str:
    np.save(os.path.join(out, name + ".npy"), np.frombuffer(taken, np.int64))
    return name + ".npy"


def _written(out: str) -> str | None:
    return _TELEMETRY if os.path.exists(os.path.join(out, _TELEMETRY)) else None


def _ran(
    description: dict[str, Any],
    provider: str,
    threads: int | None,
    checked: dict[str, Any] | None,
    profiled: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return what really ran.

    Args:
        description: What ``engine.json`` says.
        provider: Of the session.
        threads: Of the session.
        checked: What :func:`layers.check` has found, which refuses by itself; None where the runtime does not tell.
        profiled: What the profile says where it tells, which is ONNX Runtime's.

    Returns:
        ``provider``, ``threads``, ``precision`` (how many convolutions and matrix products in each; None where
        nobody tells), ``fallback`` (operators that ran elsewhere).

    Raises:
        Refusal: It is not what was asked for.
    """
    if profiled is None:
        precision = None if checked is None else layers.count(description["expected"], checked)
        profiled = {"precision": precision, "fallback": []}
    elif profiled["fallback"]:
        raise Refusal(
            "asked for {}, and these operators ran elsewhere: {}".format(provider, ", ".join(profiled["fallback"])),
            "use another --runtime, or express that part of the model with other operators",
        )
    elif profiled["precision"] and description["precision"] not in profiled["precision"]:
        raise Refusal(
            "asked for {}, and {} ran the convolutions and matrix products otherwise: {}".format(
                description["precision"],
                provider,
                ", ".join("{} in {}".format(count, name) for name, count in sorted(profiled["precision"].items())),
            ),
            "ask for what the device computes in (--precision), or use another --runtime",
        )
    return dict(profiled, provider=provider, threads=threads)


def _with_trtexec(request: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """Measure with trtexec, where Python cannot run a plan."""
    out, largest = request["out"], description["batches"]["max"] if description["batches"] else 1
    warmup_ms = min(request["warmup_ms"], _TRTEXEC_WARMUP_MS)
    entries: list[dict[str, Any]] = []
    not_measured = {"accuracy": _FOR_LOGITS, "peak memory": _FOR_LOGITS}
    settings: dict[str, Any] = {}
    steady = False
    with telemetry.sampled(os.path.join(out, _TELEMETRY)) as notes:
        for order in request["scenarios"]:
            name, batch = _named(order), order.get("batch", 1)
            if order["name"] == "DutyCycle":
                not_measured[name] = "trtexec sends one query after another"
                continue
            if batch > largest:
                not_measured[name] = "the engine takes batches of {} at most".format(largest)
                continue
            began = time.monotonic_ns()
            result = time_plan(
                request["release"],
                description,
                batch=batch,
                warmup_ms=warmup_ms,
                duration_ms=order["duration_ms"],
                queries=order.get("queries", 1),
            )
            ended = time.monotonic_ns()
            taken = array("q", result["latencies"])
            if order["name"] == "SingleStream":
                settings, steady = result["settings"], warmup.is_steady(taken)
            entry = {"name": order["name"], "batch": batch, "file": _keep(out, name, taken), "queries": len(taken)}
            entries.append(dict(entry, began_ns=began, ended_ns=ended, cpu=None))
    profile = _NO_PROFILE
    if request["profile"]:
        profile = profiles.layers(request["release"], description, None, images=np.empty(0))
    provider = description["provider"] + " through trtexec"
    return {
        "scenarios": entries,
        # trtexec warms up for a given time and does not tell how it went: what followed does
        "warmup": {"steady": steady, "queries": None, "ms": warmup_ms},
        "load_ms": None,
        "first_ms": None,
        "overhead_ns": None,
        "peak_memory_bytes": None,
        "provider": provider,
        "settings": settings,
        "layers": description["layers"],
        "notes": [_FOR_LOGITS, *notes, *profile["notes"]],
        "conditions": conditions.NONE,
        "ran": _ran(description, provider, None, description["layers"], None),
        "telemetry": _written(out),
        "profile": profile["layers"],
        "images": 0,
        "not_measured": not_measured,
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


def evaluate(session: Any, images: np.ndarray) -> np.ndarray:
    """Return the logits of every image, float32 ``(N, classes)``, by the path of the timed queries."""
    batch = min(64, session.max_batch)
    parts = []
    for start in range(0, len(images), batch):
        query = session.prepare(np.array(images[start : start + batch]))
        parts.append(np.array(query(), np.float32))
        if start % (batch * 20) == 0:
            progress(start, len(images), "accuracy")
    return np.concatenate(parts)
