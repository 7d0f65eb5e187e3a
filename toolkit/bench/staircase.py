"""Why latency falls less than FLOPs: each layer's share of the FLOPs against its share of the time."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.bench.products import Product, products

# what runtimes put around the name of a node or tensor: ONNX Runtime's graph transformers, OpenVINO's ONNX frontend
_DECORATION = re.compile(r"_nchwc$|_token_\d+$|/WithoutBiases(/.*)?$")
_IS_PRODUCT = re.compile(r"conv(?!ert)|gemm|matmul|matrixmultiply|fullyconnected", re.IGNORECASE)
_IS_COPY = re.compile(r"^Reformatting CopyNode")  # TensorRT's, named after the layer that it serves

# kernels for Tensor Cores read 16 bytes at a time (NVIDIA/cutlass#75): 8 channels in fp16, as NVIDIA's guide to
# convolutional layers asks for, 16 in int8 and fp8; fp32 is built without TF32 and does without
_TENSOR_CORES = {"fp16": 8, "bf16": 8, "int8": 16, "fp8": 16}


def multiple(facts: Mapping[str, Any], runtime: str, precision: str) -> int | None:
    """Return the number of channels that a device's arithmetic comes in; None where none is known.

    On a CPU that is how many 32-bit accumulators a vector register holds, whatever the precision of the operands:
    16 with AVX-512, 8 with AVX2, 4 with NEON. ONNX Runtime and OpenVINO block channels by it (MLAS,
    ``NchwcBlockSize``; oneDNN, ``nChw16c`` and ``nChw8c``).

    Args:
        facts: Of the device (``agent.facts.collect``).
        runtime: The engine's.
        precision: The layer's.
    """
    if runtime.startswith("tensorrt"):
        return _TENSOR_CORES.get(precision)
    bits: int | None = facts["vector_bits"]
    return bits and bits // 32


def staircase(
    out: Path, graph: Path, profile: Sequence[Mapping[str, Any]] | None, facts: Mapping[str, Any], runtime: str
) -> dict[str, Any] | None:
    """Hold an engine's per-layer times against its graph's FLOPs; writes ``staircase.json``.

    Args:
        out: Folder for ``staircase.json``.
        graph: The ONNX file that the engine was built from.
        profile: The agent's: ``name``, ``type``, ``us`` (median microseconds a query) and ``nodes`` (names of the
            ONNX nodes that it stands for, where the runtime tells) of each layer, in order.
        facts: Of the device.
        runtime: The engine's.

    Returns:
        ``sentence``; None, and no file, without a profile, or where no layer of it can be told from the graph.
    """
    asked = products(graph) if profile else []
    matched = _match(asked, profile or [])
    if not profile or not matched:
        return None
    flops, time = sum(product.flops for product in asked), sum(layer["us"] for layer in profile)
    layers = [
        _row(layer, matched[index], flops, time, facts, runtime)
        for index, layer in enumerate(profile)
        if index in matched
    ]
    others: Counter[str] = Counter()
    for index, layer in enumerate(profile):
        if index not in matched:
            others[layer["type"]] += layer["us"]
    found = sum(len(stood_for) for stood_for in matched.values())
    sentence = _sentence(layers, others, time, len(asked) - found)
    whole = {
        "layers": layers,
        "other_us": sum(others.values()),
        "others": [{"type": kind, "us": us} for kind, us in others.most_common()],
        "sentence": sentence,
    }
    (out / "staircase.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    return {"sentence": sentence}


def _match(asked: Sequence[Product], profile: Sequence[Mapping[str, Any]]) -> dict[int, list[Product]]:
    """Return the products that each layer of a profile stands for, by the layer's index.

    By the nodes that the runtime tells, by the names of nodes and tensors in the layer's own name, and what then is
    left on both sides in order, if it is equally many: not every node has a name.
    """
    matched: dict[int, list[Product]] = defaultdict(list)
    left = []
    for product in asked:
        named = [index for index, layer in enumerate(profile) if _stands_for(layer, product)]
        if named:
            matched[max(named, key=lambda index: profile[index]["us"])].append(product)
        else:
            left.append(product)
    free = [
        index for index, layer in enumerate(profile) if index not in matched and _IS_PRODUCT.search(layer["type"])
    ]
    if len(free) == len(left):
        for index, product in zip(free, left, strict=True):
            matched[index].append(product)
    return dict(matched)


def _stands_for(layer: Mapping[str, Any], product: Product) -> bool:
    if _IS_COPY.match(layer["name"]):
        return False
    if product.name and product.name in layer["nodes"]:
        return True
    names = {product.name, *product.tensors} if _IS_PRODUCT.search(layer["type"]) else {product.name}
    plain = _DECORATION.sub("", layer["name"])
    return any(name and re.search(rf"(?<![\w./]){re.escape(name)}(?![\w./])", plain) for name in names)


def _row(
    layer: Mapping[str, Any],
    stood_for: Sequence[Product],
    flops: int,
    time: float,
    facts: Mapping[str, Any],
    runtime: str,
) -> dict[str, Any]:
    main = max(stood_for, key=lambda product: product.flops)
    own = sum(product.flops for product in stood_for)
    step = multiple(facts, runtime, main.precision)
    chosen = None if main.is_last else main.out_channels
    widths = (None if main.is_first else main.in_channels, chosen)
    return {
        "name": main.name or layer["name"],
        "type": layer["type"],
        "flops": own,
        "flops_share": own / flops,
        "us": layer["us"],
        "time_share": layer["us"] / time,
        "in_channels": main.in_channels,
        "out_channels": main.out_channels,
        "multiple": step,
        "misses": step is not None and any(width is not None and width % step for width in widths),
        "next_width": None if step is None or chosen is None else (chosen - 1) // step * step or None,
    }


def _sentence(layers: Sequence[Mapping[str, Any]], others: Counter[str], time: float, unknown: int) -> str:
    parts = [f"the layers with FLOPs take {sum(layer['us'] for layer in layers) / time:.0%} of the time"]
    if others:
        kinds = [kind for kind, _ in others.most_common(2)] + ["others"] * (len(others) > 2)
        listed = " and ".join([", ".join(kinds[:-1]), kinds[-1]] if kinds[1:] else kinds)
        parts.append(f"{sum(others.values()) / time:.0%} goes to {listed}, which have none to prune")
    steps = sorted({layer["multiple"] for layer in layers if layer["multiple"]})
    if steps:
        missing = sum(layer["misses"] for layer in layers)
        parts.append(
            f"{missing or 'none'} of {len(layers)} miss a multiple of {' or '.join(map(str, steps))} channels"
        )
    if unknown:
        parts.append(f"{unknown} more are not to be told in the profile")
    return "; ".join(parts)
