"""Networks made several at a time, in processes of this machine."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import networks
from toolkit.console import Console
from toolkit.errors import StageError, ToolkitError
from toolkit.job import Job
from toolkit.stages import Planner, Reached, Runner, silenced
from toolkit.store import Artifact, Store

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

_PR_SET_PDEATHSIG = 1  # prctl.h
_MEMORY = 4e9  # bytes that a training on the CPU may take; ResNet20 on CIFAR-10 takes 1.7e9

Make = Callable[[Mapping[str, Job], str], Iterator[tuple[str, ToolkitError | None]]]
"""Makes the networks of named jobs up to a stage; yields each name, and what kept it from that, as they end."""


def compress(job: Job, until: str, console: Console) -> ToolkitError | None:
    """Make the networks of a job up to a stage; returns what kept it from that."""
    store = Store(job.build / "store")
    with store.in_use(), silenced():
        try:
            networks.compress(job, Runner(store, console, until, fast=job.fast))
        except Reached:
            pass
        except ToolkitError as error:
            return error
    return None


def found_of(job: Job, until: str) -> dict[tuple[str, str], Artifact]:
    """Return the artifacts of a job's networks that are in its store, by stage and key."""
    planner = Planner(Store(job.build / "store"), Console(quiet=True), until, fast=job.fast)
    with silenced(), contextlib.suppress(Reached, ToolkitError):
        networks.compress(job, planner)
    return {(artifact.stage, artifact.key): artifact for artifact in planner.artifacts.values()}


def fitting() -> int:
    """Return how many networks this machine can make at a time: one a GPU, else one a core that has memory."""
    import torch

    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(memory["MemAvailable"].split()[0]) * 1024
    return torch.cuda.device_count() or max(1, min(os.cpu_count() or 1, int(available / _MEMORY)))


@contextlib.contextmanager
def processes(parallel: int, console: Console) -> Iterator[Make]:
    """Yield what makes so many networks at a time, each in a process with its share of the cores, and one GPU.

    Processes, since trainings in one would share its random numbers. One at a time are made in this one.

    Args:
        parallel: How many.
        console: Who is told how far each is.

    Raises:
        StageError: A process was killed.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // parallel)
    with ProcessPoolExecutor(parallel, context, start, (threads, context.Value("i", 0))) as pool:

        def make(jobs: Mapping[str, Job], until: str) -> Iterator[tuple[str, ToolkitError | None]]:
            missing = {}
            for name, job in jobs.items():
                if until in {stage for stage, _ in found_of(job, until)}:
                    yield name, None
                else:
                    missing[name] = job
            if min(parallel, len(missing)) <= 1:
                for name, job in missing.items():
                    yield name, compress(job, until, console)
                return
            last = [missing.popitem()] if len(missing) % parallel == 1 else []  # alone, it gets all cores
            futures = {}
            for name, job in missing.items():
                futures[pool.submit(compress, job, until, Console(quiet=console.quiet, about=name))] = name
            for future in as_completed(futures):
                yield futures[future], future.result()
            for name, job in last:
                yield name, compress(job, until, Console(quiet=console.quiet, about=name))

        try:
            yield make
        except BrokenProcessPool as error:
            raise StageError("a process that trains was killed", "--parallel 1, if memory was short") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def start(threads: int, started: Synchronized[int]) -> None:
    """Prepare a process: so many threads, the GPUs in turn, and its end is left to the one that has started it.

    Args:
        threads: For each process.
        started: How many were started before.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # or it would wait for work for ever
    import torch

    with started.get_lock():
        number = started.value
        started.value += 1
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(number % gpus)
