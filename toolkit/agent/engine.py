"""Engines: build one from ONNX, load one; whatever the runtime, ``engine.json`` beside it says what it is."""

from __future__ import annotations

import json
import os
from typing import Any

from . import builder, facts, fingerprint, ort, ov, releases, signatures
from .protocol import Refusal

ENGINE = "engine.json"
_BUILDERS = {
    "onnxruntime": ort.build,
    "openvino": ov.build,
    "tensorrt": builder.build,
    "tensorrt-rtx": builder.build,
}


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build an engine from an ONNX file; see the builder of ``runtime``.

    Returns:
        What is written to ``engine.json`` in the folder ``out``.
    """
    engine = _BUILDERS[request["runtime"]](request)
    with open(os.path.join(request["out"], ENGINE), "w", encoding="utf-8") as file:
        json.dump(engine, file, indent=1, sort_keys=True)
    return engine


def read(folder: str, root: str) -> dict[str, Any]:
    """Return what ``engine.json`` says, after checking that the engine is whole and fits this device.

    Raises:
        Refusal: It is damaged, was built for another device, or is in a release whose signature does not count.
    """
    if signatures.guarded(root):
        folder = os.path.realpath(folder)
        files = releases.require_signed(folder)["files"]
        if releases.digest(os.path.join(folder, ENGINE)) != files[ENGINE]["sha256"]:
            raise Refusal("release {} is damaged: {}".format(os.path.basename(folder), ENGINE), "push it again")
    with open(os.path.join(folder, ENGINE), encoding="utf-8") as file:
        engine = json.load(file)
    problem = fingerprint.mismatch(engine["fingerprint"], facts.collect({"root": root}))
    if problem is not None:
        raise Refusal("the engine does not fit: {}".format(problem), "rebuild it for this device (--rebuild-stale)")
    if releases.digest(os.path.join(folder, engine["file"])) != engine["sha256"]:
        raise Refusal("the engine {} is damaged".format(engine["file"]), "push it again")
    return dict(engine)


def load(folder: str, root: str) -> Any:
    """Load the engine of a release: a session with ``run``, ``close``, ``provider``, ``max_batch``, ``settings``.

    Raises:
        Refusal: It is damaged, was built for another device, or cannot be loaded.
    """
    return open_session(folder, read(folder, root), root)


def open_session(folder: str, engine: dict[str, Any], root: str) -> Any:
    """Load an engine that :func:`read` has looked at."""
    path = os.path.join(folder, engine["file"])
    if engine["runtime"] == "onnxruntime":
        return ort.Session(path, engine["settings"]["intra_op_num_threads"], optimize=False)
    if engine["runtime"] == "openvino":
        return ov.Session(path, engine)
    from . import runner

    return runner.Session(path, engine, root)
