"""Does an engine compute in the precision that its graph asks for? Its own layer information tells."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from .protocol import Refusal

_UNTOLD = ("Reformat", "NoOp", "Constant", "Shuffle", "DLA")
TOLERATED = 0.02  # share of the checked nodes that may run in another precision
_WIDTH = {"int8": 0, "fp8": 0, "fp16": 1, "bf16": 1, "fp32": 2}
_SPELLINGS = (
    ("int8", re.compile(r"(?<!u)int8", re.IGNORECASE)),
    ("fp8", re.compile(r"fp8", re.IGNORECASE)),
    ("bf16", re.compile(r"bf16|bfloat", re.IGNORECASE)),
    ("fp16", re.compile(r"half|fp16|float16", re.IGNORECASE)),
    ("fp32", re.compile(r"float|fp32", re.IGNORECASE)),
)


def check(expected: dict[str, str], information: dict[str, Any]) -> dict[str, Any]:
    """Hold the layers of an engine against what its graph asks for.

    Args:
        expected: Node name to precision (``fp32``, ``fp16``, ``int8``), for the convolutions and matrix products.
        information: The engine inspector's JSON: ``Layers``, each with ``Name``, ``Inputs`` and so on.

    Returns:
        ``checked`` (nodes found in the layer information), ``unknown`` (nodes that it does not tell about),
        ``other`` (node to precision it runs in, where that is another).

    Raises:
        Refusal: More than ``TOLERATED`` of the nodes run in another precision.
    """
    found = {node: _precision_of(node, information.get("Layers", [])) for node in expected}
    other = {node: ran for node, ran in found.items() if ran is not None and ran != expected[node]}
    checked = sum(ran is not None for ran in found.values())
    if len(other) > TOLERATED * max(checked, 1):
        listed = ["{} ({} instead of {})".format(node, ran, expected[node]) for node, ran in sorted(other.items())]
        more = ", and {} more".format(len(listed) - 5) if len(listed) > 5 else ""
        raise Refusal(
            "the engine runs {} of {} layers in another precision than asked for: {}{}".format(
                len(other), checked, ", ".join(listed[:5]), more
            ),
            "ask for the precision that the device runs them in (--precision), or update its runtime",
        )
    return {"checked": checked, "unknown": sorted(set(found) - {n for n in found if found[n]}), "other": other}


def count(expected: dict[str, str], checked: dict[str, Any]) -> dict[str, int]:
    """Return how many nodes run in each precision, by what :func:`check` has returned."""
    told = {node: precision for node, precision in expected.items() if node not in checked["unknown"]}
    return dict(Counter({**told, **checked["other"]}.values()))


def _precision_of(node: str, layers: list[Any]) -> str | None:
    """Return the precision of the layers that compute a node, the widest if there are several; None if untold."""
    precisions = []
    for layer in layers:
        # of a DLA's layer the input's type is told, not those of what runs in it
        if not isinstance(layer, dict) or layer.get("LayerType") in _UNTOLD:
            continue
        if mentions(layer, node):
            precision = _reads(layer)
            if precision is not None:
                precisions.append(precision)
    return max(precisions, key=_WIDTH.__getitem__) if precisions else None


def mentions(layer: dict[str, Any], node: str) -> bool:
    """Tell whether a layer computes a node, by its name and its metadata."""
    name = re.compile(r"(?<![\w./]){}(?![\w./])".format(re.escape(node)))
    return any(name.search(str(layer.get(key, ""))) for key in ("Name", "Metadata"))


def _reads(layer: dict[str, Any]) -> str | None:
    """Return the narrowest type of the activations that a layer reads (a residual may be wider).

    TensorRT 8 hides the formats of dynamic shapes ("N/A due to dynamic shapes"); then the weights' type counts.
    """
    tensors = [tensor for tensor in layer.get("Inputs", []) if isinstance(tensor, dict)]
    # "Format/Datatype" up to TensorRT 10; its documents and sources spell 11's key "Datatype" and "DataType"
    found = [_spelled(" ".join(str(v) for k, v in t.items() if "type" in k.lower())) for t in tensors]
    known = [precision for precision in found if precision is not None]
    if known:
        return min(known, key=_WIDTH.__getitem__)
    weights = layer.get("Weights")
    return _spelled(str(weights.get("Type", ""))) if isinstance(weights, dict) else None


def _spelled(text: str) -> str | None:
    return next((name for name, spelling in _SPELLINGS if spelling.search(text)), None)
