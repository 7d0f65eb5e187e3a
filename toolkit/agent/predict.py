"""What the current release says of images: for the host, and as a command of its own on the device."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from .model import Answer, Model
from .protocol import Refusal


def compute(request: dict[str, Any]) -> dict[str, Any]:
    """Run images through a release.

    Args:
        request: ``root``, ``id``, ``images`` (path of an array, uint8 ``(N, 3, S, S)``).

    Returns:
        ``logits`` (nested lists), ``classes``, ``release``.
    """
    folder = os.path.join(request["root"], "releases", request["id"])
    with contextlib.closing(Model(folder, reload=False)) as model:
        logits = model(np.load(request["images"], mmap_mode="r"))
        return {"logits": logits.tolist(), "classes": model.classes, "release": model.release}


def command(arguments: list[str]) -> int:
    """Run ``agent.pyz predict IMAGE...`` in the release that this agent is part of."""
    parser = argparse.ArgumentParser("agent.pyz predict", description="Say what this release sees on images.")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="likeliest classes to print (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    for path in options.images:
        if not os.path.isfile(path):
            parser.error("there is no file {}".format(path))
    folder = os.path.dirname(os.path.abspath(sys.argv[0]))
    if not os.path.exists(os.path.join(folder, "manifest.json")):
        raise Refusal("this agent is part of no release", "python3 ROOT/current/agent.pyz predict IMAGE")
    with contextlib.closing(Model(folder, reload=False)) as model:
        answer = model.predict(options.images)
    print(told(options.images, answer, options.top, as_json=options.json))
    return 0


def told(names: Sequence[str], answer: Answer, count: int, *, as_json: bool) -> str:
    """Return an answer as a line an image, or as a JSON document with the release beside it."""
    found = list(zip(names, answer.top(count)))
    if as_json:
        listed = [
            {"image": name, "classes": [{"class": label, "score": score} for label, score in best]}
            for name, best in found
        ]
        return json.dumps({"release": answer.release, "images": listed}, indent=1, ensure_ascii=False)
    return "\n".join(
        "{}: {}".format(name, ", ".join("{} {:.4f}".format(label, score) for label, score in best))
        for name, best in found
    )
