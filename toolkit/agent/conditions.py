"""What keeps a measurement to itself: its own CPUs, a high priority, memory that stays, no garbage collection."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from typing import Any

_CURRENT_ON_FAULT = 1 | 4  # MCL_CURRENT | MCL_ONFAULT: what is in memory stays there, and nothing more comes in
_HIGHEST = -20
# of another program, which this one does not touch
NONE: dict[str, Any] = {
    "affinity": None,
    "nice": None,
    "garbage_collection": "none",
    "memory_locked": False,
    "notes": ["trtexec measures, as the program that it is"],
}


@contextlib.contextmanager
def quiet(threads: int | None) -> Iterator[dict[str, Any]]:
    """Have this process to itself as far as it is allowed, and everything back as it was afterwards.

    Args:
        threads: That compute on the CPU; None where something else computes.

    Yields:
        ``affinity`` (CPUs that it is bound to, or None), ``nice`` (or None where it could not be raised),
        ``garbage_collection`` (``off``), ``memory_locked``, ``notes`` (why not, in words).
    """
    notes: list[str] = []
    with contextlib.ExitStack() as undo:
        cpus = own_cpus(threads)
        if cpus is None:
            notes.append("not bound to CPUs: there is none to spare, or the GPU computes")
        else:
            undo.enter_context(_bound(cpus))
        nice = undo.enter_context(_first_in_line(notes))
        locked = undo.enter_context(_locked(notes))
        undo.enter_context(_uncollected())
        yield {
            "affinity": cpus,
            "nice": nice,
            "garbage_collection": "off",
            "memory_locked": locked,
            "notes": notes,
        }


def own_cpus(threads: int | None, system: str = "/sys") -> list[int] | None:
    """Return as many CPUs as there are threads, or None when that would leave none for everything else.

    The fastest ones first, then those that share no core, then those with high numbers: interrupts mostly go to 0.
    """
    allowed = os.sched_getaffinity(0)
    if threads is None or threads >= len(allowed):
        return None

    def of(cpu: int, name: str) -> str:
        try:
            with open("{}/devices/system/cpu/cpu{}/{}".format(system, cpu, name), encoding="ascii") as file:
                return file.read().strip()
        except OSError:
            return ""

    ranked = sorted(allowed, key=lambda cpu: (int(of(cpu, "cpufreq/cpuinfo_max_freq") or 0), cpu), reverse=True)
    cores: dict[str, int] = {}
    turns = []
    for cpu in ranked:
        core = of(cpu, "topology/thread_siblings_list") or str(cpu)
        cores[core] = cores.get(core, 0) + 1
        turns.append((cores[core], cpu))
    chosen = sorted(turns, key=lambda turn: turn[0])[:threads]  # stable: the fastest stay in front
    return sorted(cpu for _, cpu in chosen)


def _tasks() -> list[int]:
    """Return this process's threads: on Linux each has CPUs and a priority of its own."""
    return [int(name) for name in os.listdir("/proc/self/task")]


@contextlib.contextmanager
def _bound(cpus: list[int]) -> Iterator[None]:
    before = {task: os.sched_getaffinity(task) for task in _tasks()}
    for task in before:
        os.sched_setaffinity(task, cpus)
    try:
        yield
    finally:
        for task in _tasks():
            with contextlib.suppress(ProcessLookupError):  # a thread that has ended meanwhile
                os.sched_setaffinity(task, before.get(task) or before[os.getpid()])


@contextlib.contextmanager
def _first_in_line(notes: list[str]) -> Iterator[int | None]:
    before = {task: os.getpriority(os.PRIO_PROCESS, task) for task in _tasks()}
    try:
        for task in before:
            os.setpriority(os.PRIO_PROCESS, task, _HIGHEST)
    except PermissionError:
        notes.append("priority not raised: that takes root, or a limit of `nice -20` in /etc/security/limits.conf")
        yield None
        return
    if _grouped():
        notes.append(
            "priority counts among the programs of its own session only: sysctl kernel.sched_autogroup_enabled=0"
        )
    try:
        yield _HIGHEST
    finally:
        for task in _tasks():
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, task, before.get(task, before[os.getpid()]))


def _grouped() -> bool:
    """Tell whether the kernel shares CPUs between sessions first, whatever the priorities (sched(7))."""
    try:
        with open("/proc/sys/kernel/sched_autogroup_enabled", encoding="ascii") as file:
            return file.read().strip() == "1"
    except OSError:
        return False


@contextlib.contextmanager
def _locked(notes: list[str]) -> Iterator[bool]:
    libc = ctypes.CDLL(None, use_errno=True)
    locked = libc.mlockall(_CURRENT_ON_FAULT) == 0
    if not locked:
        reason = os.strerror(ctypes.get_errno())
        notes.append("memory not locked ({}): raise `ulimit -l` for the user".format(reason))
    try:
        yield locked
    finally:
        libc.munlockall()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
