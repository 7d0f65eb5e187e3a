"""Scores of FastNAS's candidates, each computed from the first layer on that the candidate changes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.compression.batchnorm import calibrating, recalibrate
from toolkit.compression.images import Images, accuracy, predict

log = logging.getLogger(__name__)

_KEPT_BYTES = 2e9  # of what the layers before the first changed one have computed; no more than that is kept

Values = dict[fx.Node, Any]


class Scorer:
    """The validation accuracy of one candidate after another of a network that FastNAS searches.

    A candidate differs from the whole network in a few layers. All before the first of them computes what it
    computed for the candidate before, so that its results, for calibration and for validation, are kept. The rest
    goes as in Model Optimizer: batch norm is calibrated anew on the same batches, then the images are evaluated.
    The same operations run on the same numbers, so that a score equals the plain one to the last bit.

    A network that `torch.fx` cannot trace, or traces into something else, is scored the plain way.

    Args:
        calibration: Returns the batches ``(B, 3, S, S)`` that Model Optimizer recalibrates batch norm with.
        val: The images to be told apart.
    """

    def __init__(self, calibration: Callable[[], Iterable[Tensor]], val: Images) -> None:
        self._calibration, self._val = calibration, val
        self._program: _Program | None = None
        self._asked = False
        self._forget()

    def _forget(self) -> None:
        self._at = 1  # what comes before this node has been computed, and this is what later nodes take of it
        self._kept: dict[str, list[Values]] = {}

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> float:
        """Return the accuracy (0 to 1) of the candidate that is selected in ``network``."""
        if self._program is None:
            recalibrate(network, self._calibration())
            logits = predict(network, self._val)
            if not self._asked:
                self._asked = True
                self._program = _trace(network, next(self._val.evaluation())[0], logits)
            return accuracy(logits, self._val)
        program = self._program
        changed = program.first_changed()
        if changed < self._at:
            self._forget()
        if changed > self._at:
            self._advance(program, changed)
        with program.calibrating(self._at, program.calibrated):
            for values in self._values("calibration"):
                program.run(values, self._at, program.calibrated)
        logits = torch.cat([program.run(values, self._at)[program.output] for values in self._values("validation")])
        return accuracy(logits, self._val)

    def _values(self, kind: str) -> Iterator[Values]:
        """Yield what is known before the node ``_at``, a batch at a time; the receiver may change it in place."""
        assert self._program is not None
        if self._kept:
            yield from map(_copy, self._kept[kind])
        elif kind == "calibration":
            yield from map(self._program.begin, self._calibration())
        else:
            yield from (self._program.begin(inputs) for inputs, _ in self._val.evaluation())

    def _advance(self, program: _Program, stop: int) -> None:
        """Keep what is computed before the node ``stop``, where it is not too much."""
        batches = sum(1 for _ in self._calibration()) + sum(1 for _ in self._val.evaluation())
        if _bytes(program.run(next(self._values("validation")), self._at, stop)) * batches > _KEPT_BYTES:
            return
        with program.calibrating(self._at, stop):
            calibration = [program.run(values, self._at, stop) for values in self._values("calibration")]
        validation = [program.run(values, self._at, stop) for values in self._values("validation")]
        self._at, self._kept = stop, {"calibration": calibration, "validation": validation}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(m.children()) or super().is_leaf_module(m, module_qualified_name)


class _Program:
    """A network as a list of operations that can be run in pieces.

    Args:
        network: In the middle of FastNAS's search; its layers take whatever width is selected.

    Raises:
        Exception: It cannot be traced.
        ValueError: A batch norm stands in two places, so that it cannot be calibrated for one of them.
    """

    def __init__(self, network: nn.Module) -> None:
        graph = _Tracer().trace(network)
        self._network = network
        self._interpreter = fx.Interpreter(fx.GraphModule(network, graph), garbage_collect_values=False)
        self._interpreter.args_iter = iter(())
        self._nodes = list(graph.nodes)
        self.output = self._nodes[-1]
        place = {node: index for index, node in enumerate(self._nodes)}
        self._unused_after: list[list[fx.Node]] = [[] for _ in self._nodes]
        for node in self._nodes[:-1]:
            self._unused_after[max((place[user] for user in node.users), default=place[node])].append(node)
        norms = [norm for index in range(len(self._nodes)) for norm in self._norms(index)]
        if len({id(norm) for norm in norms}) < len(norms):
            raise ValueError("a batch norm is used twice")
        self.calibrated = max((i + 1 for i in range(len(self._nodes)) if self._norms(i)), default=1)

    def _norms(self, index: int) -> list[_BatchNorm]:
        node = self._nodes[index]
        if node.op != "call_module":
            return []
        module = self._network.get_submodule(str(node.target))
        return [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]

    def begin(self, inputs: Tensor) -> Values:
        """Return what is known before node 1."""
        return {self._nodes[0]: inputs}

    def run(self, values: Values, start: int, stop: int | None = None) -> Values:
        """Run the nodes from ``start`` to before ``stop`` (the end); returns what later ones take."""
        self._interpreter.env = values
        for index in range(start, len(self._nodes) if stop is None else stop):
            values[self._nodes[index]] = self._interpreter.run_node(self._nodes[index])
            for node in self._unused_after[index]:
                del values[node]
        return values

    def first_changed(self) -> int:
        """Return the first node that the candidate computes differently from the whole network."""
        from modelopt.torch.opt.utils import named_hparams

        changed = {name.rpartition(".")[0] for name, hp in named_hparams(self._network) if hp.active != hp.max}
        for index, node in enumerate(self._nodes):
            if node.op in ("call_module", "get_attr"):
                path = f"{node.target}."
                if any(path.startswith(f"{name}.") or name.startswith(path) for name in changed):
                    return index
        return 1 if changed else len(self._nodes)

    def calibrating(self, start: int, stop: int) -> contextlib.AbstractContextManager[None]:
        """Calibrate the batch norms of a piece on what is run inside."""
        return calibrating([norm for index in range(start, stop) for norm in self._norms(index)])


def _trace(network: nn.Module, inputs: Tensor, expected: Tensor) -> _Program | None:
    """Return a network as a program, when that computes the same of a batch, bit for bit."""
    try:
        program = _Program(network)
        logits = program.run(program.begin(inputs), 1)[program.output]
        if not torch.equal(logits, expected[: len(inputs)]):
            raise ValueError("what was traced computes something else")
    except Exception as error:
        log.info("candidates are scored from the first layer on: %s: %s", type(error).__name__, error)
        return None
    return program


def _copy(values: Values) -> Values:
    """Copy tensors, one that several nodes share once."""
    copies = {id(value): value.clone() for value in values.values() if isinstance(value, Tensor)}
    return {node: copies.get(id(value), value) for node, value in values.items()}


def _bytes(values: Values) -> int:
    return sum(value.nbytes for value in values.values() if isinstance(value, Tensor))
