"""A network's latency predicted from its layers, by layers that were measured on the same device."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.store import Artifact


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product.

    Attributes:
        flops: 2 × MAC of one image.
        inputs: Channels in.
        outputs: Channels out.
        us: Measured median, in microseconds.
    """

    flops: float
    inputs: float
    outputs: float
    us: float


@dataclass(frozen=True)
class Network:
    """A network that was measured.

    Attributes:
        label: Its name.
        layers: Its products, which the runtime's profiler has timed.
        other_us: Time of all other layers.
        ms: Its median latency without profiler.
    """

    label: str
    layers: Sequence[Layer]
    other_us: float
    ms: float

    def others(self, known: Iterable[Network]) -> list[Network]:
        """Return those of other widths; one of the same, as before fine-tuning, would foretell too much."""

        def widths(network: Network) -> list[tuple[float, float, float]]:
            return [(layer.flops, layer.inputs, layer.outputs) for layer in network.layers]

        return [network for network in known if widths(network) != widths(self)]

    def scaled(self, share: float) -> Network:
        """Return it with so large a share of its FLOPs, as if every width were cut alike."""
        cut = share**0.5
        layers = [Layer(one.flops * share, one.inputs * cut, one.outputs * cut, 0.0) for one in self.layers]
        return Network(self.label, layers, 0.0, 0.0)


@dataclass(frozen=True)
class Table:
    """What a device takes for a layer: a constant, for each of its FLOPs, for what it reads and writes.

    Attributes:
        cost: Microseconds of each of :func:`_columns`.
        other: Microseconds of the layers without FLOPs, for what all products write.
        scale: Latency without profiler for time under it.
    """

    cost: NDArray[np.float64]
    other: float
    scale: float

    def predict(self, network: Network) -> float:
        """Return the median latency of a network, in ms; its own measured times are not looked at."""
        columns = _columns(network.layers)
        us = (columns @ self.cost).sum() + self.other * columns[:, 3].sum()
        return float(self.scale * us / 1000)


def read(label: str, bench: Artifact) -> Network | None:
    """Return the network that a ``bench`` artifact has measured; None where its layers were not timed."""
    median = bench.meta["latency_ms"]["p50"]["value"]
    if "staircase.json" not in bench.files or median is None:
        return None
    found = json.loads(bench.file("staircase.json").read_text(encoding="utf-8"))
    layers = [
        Layer(layer["flops"], layer["in_channels"], layer["out_channels"], layer["us"])
        for layer in found["layers"]
        if layer["in_channels"] and layer["out_channels"]
    ]
    return Network(label, layers, found["other_us"], median) if layers else None


def fit(networks: Sequence[Network]) -> Table:
    """Fit a table to networks that one device has measured in one precision (non-negative least squares)."""
    from scipy.optimize import nnls  # an unchanged run never loads SciPy

    layers = [layer for network in networks for layer in network.layers]
    cost, _ = nnls(_columns(layers), np.array([layer.us for layer in layers]))
    written = sum(float(_columns(network.layers)[:, 3].sum()) for network in networks)
    other = sum(network.other_us for network in networks) / written
    bare = Table(cost, other, 1.0)
    scale = float(np.median([network.ms / bare.predict(network) for network in networks]))
    return Table(cost, other, scale)


def errors(networks: Sequence[Network]) -> list[float]:
    """Return how far off each one is predicted by a table of those of other widths, as a share of its latency."""
    return [fit(network.others(networks)).predict(network) / network.ms - 1 for network in networks]


def _columns(layers: Sequence[Layer]) -> NDArray[np.float64]:
    """Return what a layer's time is made of: ``(layers, 4)``: a constant, MFLOPs, what it reads, what it writes.

    FLOPs for a channel out are in proportion to what is read, for a channel in to what is written.
    """
    return np.array([
        (1.0, layer.flops / 1e6, layer.flops / 1e6 / layer.outputs, layer.flops / 1e6 / layer.inputs)
        for layer in layers
    ])  # fmt: skip
