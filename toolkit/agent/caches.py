"""Caches that make the next build or load quicker; a damaged one is dropped."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any


def key(runtime: str, here: dict[str, Any]) -> str:
    """Return the name of the timing cache that belongs to a device as it is: a cache is of use only there."""
    gpu = here["gpus"][0] if here["gpus"] else {}
    parts = [runtime, here["runtimes"].get(runtime), gpu.get("name"), gpu.get("compute_capability")]
    return hashlib.sha256(json.dumps([*parts, here["l4t"], here["power_mode"]]).encode()).hexdigest()[:16]


def read(path: str, notes: list[str]) -> bytes:
    """Return a cache's content; nothing, and a note, where it is not what was written."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        with open(path + ".sha256", encoding="utf-8") as file:
            whole = file.read().strip() == hashlib.sha256(content).hexdigest()
    except FileNotFoundError:
        return b""
    if whole:
        return content
    notes.append("the cache {} was damaged and is not used".format(os.path.basename(path)))
    return b""


def write(path: str, content: bytes) -> None:
    """Keep a cache with its hash; half of one is recognised when it is read."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for name, data in ((path, content), (path + ".sha256", hashlib.sha256(content).hexdigest().encode())):
        with open(name + ".new", "wb") as file:
            file.write(data)
        os.replace(name + ".new", name)
