"""Training on several GPUs: a process each, which together take the steps that one would take alone.

Every process takes its share of each batch, gradients are averaged (`DistributedDataParallel`), and batch norm's
statistics are those of the whole batch (`SyncBatchNorm`): the result is that of one process but for rounding.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn
from torch.nn.parallel import DistributedDataParallel

from toolkit.config import Gpus
from toolkit.errors import StageError, ToolkitError, UsageError
from toolkit.store import Work, write_json

_LOOPBACK = "127.0.0.1"
_GRACE = 2.0  # seconds that the others have to end by themselves when one process has ended


def count(gpus: Gpus | None) -> int:
    """Return how many processes train: one for each of so many GPUs, and one where nothing was asked for.

    Raises:
        UsageError: This machine has fewer.
    """
    if gpus is None:
        return 1
    there = torch.cuda.device_count()
    if there == 0:
        raise UsageError(f"--gpus {gpus}: PyTorch finds no GPU on this machine", "leave out --gpus")
    if gpus == "all":
        return there
    if gpus > there:
        raise UsageError(f"--gpus {gpus}: PyTorch finds {there} on this machine", f"give --gpus {there}, or all")
    return gpus


def require(gpus: Gpus | None, batch: int) -> None:
    """Make sure that there are so many GPUs and that a batch can be divided among them; raises UsageError."""
    processes = count(gpus)
    if processes > 1 and not _divides(processes, batch):
        fewer = next(number for number in range(processes, 0, -1) if number == 1 or _divides(number, batch))
        raise UsageError(
            f"recipe.batch {batch} cannot be divided among {processes} GPUs, two images or more to each",
            f"give --gpus {fewer}, or another recipe.batch in the profile",
        )


def _divides(processes: int, images: int) -> bool:
    return images % processes == 0 and images >= 2 * processes


def rank() -> int:
    """Return which of the processes this is; the first, 0, also where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch: slice) -> slice:
    """Return this process's part of a batch.

    A batch that cannot be divided evenly, as an epoch's last may be, is computed whole by every process: the mean
    of equal gradients is the gradient.

    Args:
        batch: Where the batch stands in the epoch, with a start and a stop.
    """
    images = batch.stop - batch.start
    if size() == 1 or not _divides(size(), images):
        return batch
    part = images // size()
    return slice(batch.start + rank() * part, batch.start + (rank() + 1) * part)


def replicate(network: nn.Module) -> nn.Module:
    """Return what computes a step with the other processes; it has the network's own weights and buffers."""
    if size() == 1:
        return network
    if next(network.parameters()).is_cuda:  # there is no other SyncBatchNorm
        network = synchronised(network)
    return DistributedDataParallel(network, broadcast_buffers=False, find_unused_parameters=True)


def synchronised(network: nn.Module) -> nn.Module:
    """Return a copy in training mode with the same weights and buffers, whose batch norms are `SyncBatchNorm`."""
    shared = {id(tensor): tensor for tensor in itertools.chain(network.parameters(), network.buffers())}
    copied: nn.Module = copy.deepcopy(network, shared)
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(copied)  # type: ignore[no-untyped-call]
    return converted.train()


def mean(values: Tensor) -> Tensor:
    """Return the mean of the processes' values, the same in each."""
    if size() > 1:
        dist.all_reduce(values)
    return values / size()


def first(value: Callable[[], float]) -> float:
    """Return what the first process finds, which alone looks, so that all of them decide alike."""
    if size() == 1:
        return value()
    told = [value() if rank() == 0 else 0.0]
    dist.broadcast_object_list(told)
    return told[0]


def run(
    gpus: Gpus | None, function: Callable[..., dict[str, Any]], work: Work, *arguments: Any, **options: Any
) -> dict[str, Any]:
    """Return what a training returns, done here or by a process for each GPU.

    Whatever ends this process ends the others too. What they compute is the same for any number of them, so that a
    training goes on from its checkpoint with more or fewer.

    Args:
        gpus: How many; None for one process, on a GPU if there is one.
        function: Called as ``function(work, *arguments, **options)`` in each process; importable, as its arguments
            are. What the first one returns counts.
        work: Output, checkpoints and progress, which is that of the first process.
        arguments: Of the function.
        options: Of the function.

    Returns:
        The function's result; with ``gpus`` where several were at work.

    Raises:
        StageError: A process was killed.
        ToolkitError: What the function raises.
    """
    processes = count(gpus)
    if processes == 1:
        return function(work, *arguments, **options)
    store = TCPStore(_LOOPBACK, 0, is_master=True, wait_for_workers=False)
    told: SimpleQueue[Any] = multiprocessing.get_context("spawn").SimpleQueue()
    problems: list[Exception] = []

    def listen() -> None:
        while not told.empty():
            message = told.get()
            if isinstance(message, Exception):
                problems.append(message)
            else:
                work.progress(*message)

    task = (processes, store.port, told, function, work.out, work.resume, arguments, options)
    with _interruptions_held():
        context = spawn(_process, task, processes, join=False, daemon=True)  # type: ignore[no-untyped-call]
    try:
        while not context.join(timeout=0.1, grace_period=_GRACE):
            listen()
        listen()
    except (ProcessExitedException, ProcessRaisedException) as failure:
        listen()
        exits = [process.exitcode or 0 for process in context.processes]
        raise (problems[0] if problems else _explain(failure, exits)) from None
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    result: dict[str, Any] = json.loads(_result(work.resume).read_text())
    return result | {"gpus": processes}


def _explain(failure: ProcessExitedException | ProcessRaisedException, exits: list[int]) -> Exception:
    """Return a sentence about a process that was killed; what the others say of losing it comes second to that."""
    killed = [number for number, status in enumerate(exits) if status < 0 and status != -signal.SIGTERM]
    if not killed and isinstance(failure, ProcessRaisedException):
        return failure
    lost = killed[0] if killed else failure.error_index
    status = exits[lost]
    how = f"was killed ({signal.Signals(-status).name})" if status < 0 else f"ended with exit status {status}"
    return StageError(
        f"the process that trains on GPU {lost} {how}; the others were ended",
        "the same command goes on after the last epoch that was finished, also with another --gpus",
    )


def _result(folder: Path) -> Path:
    return folder / "result.json"


@contextlib.contextmanager
def _interruptions_held() -> Iterator[None]:
    """Let Ctrl-C wait, here and in the processes that are started, which would end with a traceback each."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _process(
    number: int,
    processes: int,
    port: int,
    told: SimpleQueue[Any],
    function: Callable[..., dict[str, Any]],
    out: Path,
    resume: Path,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """Do the work of one process."""
    # also what comes when the process that has started this one ends: checkpoints are whole at any moment
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a program may be reading stdout
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(number)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    store = TCPStore(_LOOPBACK, port)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=number, world_size=processes)
    work = Work(out, resume)
    if number == 0:
        work.progress = lambda *message: told.put(message)
    try:
        result = function(work, *arguments, **options)
    except (ToolkitError, OSError) as problem:
        told.put(problem)
        sys.exit(1)
    if number == 0:
        write_json(_result(resume), result)
    dist.destroy_process_group()
