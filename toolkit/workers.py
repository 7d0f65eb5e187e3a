"""Networks made several at a time, in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import networks
from toolkit.console import Console
from toolkit.errors import StageError, ToolkitError
from toolkit.job import Job
from toolkit.stages import Reached, Runner, silenced
from toolkit.store import Store

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

_MEMORY = 4e9  # bytes that a training on the CPU may take; ResNet20 on CIFAR-10 takes 1.7e9

Make = Callable[[Sequence[Job], str], Iterator[tuple[int, str]]]
"""Makes the networks of jobs up to a stage; yields each job's index, and what became of it, as they end."""


def compress(job: Job, until: str, console: Console) -> str:
    """Make the networks of a job up to a stage; returns what became of them."""
    store = Store(job.build / "store")
    with store.in_use(), silenced():
        try:
            networks.compress(job, Runner(store, console, until, fast=job.fast))
        except Reached:
            pass
        except ToolkitError as error:
            return f"not made: {error.message}"
    return "made"


def fitting() -> int:
    """Return how many networks this machine can make at a time: one a GPU, else one a core that has memory."""
    import torch

    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(memory["MemAvailable"].split()[0]) * 1024
    return torch.cuda.device_count() or max(1, min(os.cpu_count() or 1, int(available / _MEMORY)))


@contextmanager
def processes(parallel: int, console: Console) -> Iterator[Make]:
    """Yield what makes so many networks at a time, each in a process with its share of the cores, and one GPU.

    Processes, since trainings in one would share its random numbers. A network alone is made in this one.

    Args:
        parallel: How many.
        console: Who is told how far each is.

    Raises:
        StageError: A process was killed.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // parallel)
    with ProcessPoolExecutor(parallel, context, start, (threads, context.Value("i", 0))) as pool:

        def make(jobs: Sequence[Job], until: str) -> Iterator[tuple[int, str]]:
            if len(jobs) == 1:
                yield 0, compress(jobs[0], until, console)
                return
            futures = {}
            for index, job in enumerate(jobs):
                about = Console(quiet=console.quiet, about=f"{job.budget} {job.profile.pruner}")
                futures[pool.submit(compress, job, until, about)] = index
            for future in as_completed(futures):
                yield futures[future], future.result()

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
    """Prepare a process: so many threads, the GPUs in turn, and Ctrl-C is left to the one that has started it.

    Args:
        threads: For each process.
        started: How many were started before.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    with started.get_lock():
        number = started.value
        started.value += 1
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(number % gpus)
