"""Whether `torch.compile` pays back within a training: measured once a network and machine, then remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from toolkit.compression.steps import Backward, Run
from toolkit.store import write_json

log = logging.getLogger(__name__)

_STEPS = 5  # measured of each kind, after one that warms up
# seconds of training; ResNet20 takes 25 to 50 s to compile on 2 cores, and 3/4 or more of a step then
_WORTH_A_TRY = 600.0


@dataclass(frozen=True)
class Measured:
    """Seconds: of a step as the network is, of one compiled, and of compiling."""

    plain: float
    compiled: float
    compiling: float

    def pays(self, steps: int) -> bool:
        """Whether so many steps are done sooner when the network is compiled first."""
        return self.compiling + steps * self.compiled < steps * self.plain


def choose(
    network: nn.Module,
    backward: Backward,
    batch: tuple[Tensor, Tensor],
    steps: int,
    programs: Path,
    tell: Callable[[str], None],
) -> Run:
    """Return what is faster for so many steps: the network, or the network compiled.

    The first training of a network here measures both, where it is long enough to have a chance; later ones go by
    the record, so that a training that is repeated or continued computes the same.

    Args:
        network: As it is before its first step, and as it will be left.
        backward: What a step of training computes; optimising takes the same time either way.
        batch: Inputs and labels of one.
        steps: How many there will be.
        programs: Folder of compiled programs and of the record, kept between runs.
        tell: Told what was chosen, and why.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        log.info("not compiled: there is no C++ compiler here")
        return network
    record = programs / f"{_identify(network, batch[0])}.json"
    measured = Measured(**json.loads(record.read_text())) if record.exists() else None
    run: Run = network
    with _left_as_it_is(network):
        if measured is None:
            plain = _seconds(backward, batch)
            if steps * plain < _WORTH_A_TRY:
                return network
        if measured is None or measured.pays(steps):
            tell("compiles the network")
            try:
                begin = time.perf_counter()
                run = backward.run = _compile(network, programs)
                backward(*batch)
                compiling = time.perf_counter() - begin
            except Exception as error:  # whatever a compiler may run into: the network runs without it
                log.warning("torch.compile failed, and the training goes on without it: %s", error)
                return network
        if measured is None:
            measured = Measured(plain, _seconds(backward, batch), compiling)
            write_json(record, asdict(measured))
    pays = measured.pays(steps)
    tell(
        f"{'compiled' if pays else 'not compiled'}: {measured.compiled * 1e3:.0f} instead of "
        f"{measured.plain * 1e3:.0f} ms a step, and {measured.compiling:.0f} s to compile"
    )
    return run if pays else network


def _compile(network: nn.Module, programs: Path) -> Run:
    programs.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(programs.resolve())
    compiled: Run = torch.compile(network, dynamic=False)
    return compiled


def _seconds(backward: Backward, batch: tuple[Tensor, Tensor]) -> float:
    """Return the median time of a step, after one that warms up."""
    times = []
    for _ in range(1 + _STEPS):
        begin = time.perf_counter()
        backward(*batch).item()  # waits for a GPU
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


@contextlib.contextmanager
def _left_as_it_is(network: nn.Module) -> Iterator[None]:
    """Undo what steps do to a network: statistics and gradients."""
    state = {key: value.clone() for key, value in network.state_dict().items()}
    try:
        yield
    finally:
        network.load_state_dict(state)
        network.zero_grad(set_to_none=True)


def _identify(network: nn.Module, example: Tensor) -> str:
    """Return the name of all that a step's time depends on: network, batch, machine, PyTorch."""
    what = [str(network), tuple(example.shape), torch.__version__, torch.get_num_threads(), example.device.type]
    what += [torch.cuda.get_device_name()] if example.is_cuda else [platform.processor(), platform.node()]
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]
