"""Many hosts at once: a function for each, so many at a time, and in which waves."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from toolkit import devices
from toolkit.errors import InterruptionError, ToolkitError, UsageError

T = TypeVar("T")

_GRACE = 10.0  # seconds that a thread has to end after Ctrl-C: a connection that is being made cannot be broken off


def each(
    hosts: Sequence[str], work: Callable[[str], T], parallel: int, stop: threading.Event | None = None
) -> dict[str, T | ToolkitError]:
    """Do the same for many hosts; one host's error does not keep the others.

    Args:
        hosts: Their names.
        work: Called with each name, in a thread.
        parallel: How many at a time.
        stop: Once it is set, no further host is begun.

    Returns:
        By host, in their order: what ``work`` returned, or the error that it ended with. Hosts that were not begun
        are missing.

    Raises:
        InterruptionError: Ctrl-C; whatever was at work has been ended, on the hosts too.
    """
    stop = stop or threading.Event()
    left = iter(hosts)
    results: dict[str, T | ToolkitError] = {}
    bugs: list[BaseException] = []

    def take(ended: threading.Event) -> None:
        while not stop.is_set() and (host := next(left, None)) is not None:
            try:
                results[host] = work(host)
            except ToolkitError as error:
                results[host] = error
            except BaseException as bug:  # raised below, where it is seen
                bugs.append(bug)
        ended.set()

    # Event.wait, since Python 3.11 takes a thread for ended when its join was interrupted (bpo-45274)
    ends = [threading.Event() for _ in range(min(parallel, len(hosts)))]
    try:
        for ended in ends:
            threading.Thread(target=take, args=(ended,), daemon=True).start()
        for ended in ends:
            ended.wait()
    except KeyboardInterrupt:
        stop.set()
        devices.break_off()
        last = time.monotonic() + _GRACE
        for ended in ends:
            ended.wait(max(0.0, last - time.monotonic()))
        raise InterruptionError("interrupted", "the same command continues where it stopped") from None
    if bugs:
        raise bugs[0]
    return {host: results[host] for host in hosts if host in results}


def waves(text: str, hosts: Sequence[str]) -> list[list[str]]:
    """Cut hosts into waves, each with at least one host that is new.

    Args:
        text: How many of the hosts have been reached after each wave: ``1,10%,100%``.
        hosts: Their names.

    Raises:
        UsageError: It is none, or does not end with all of them.
    """
    ends = []
    for word in text.split(","):
        number = word.strip().removesuffix("%")
        if not (number.isascii() and number.isdigit()) or int(number) == 0:
            raise UsageError(f"--waves: '{word}' is no number of hosts", "write counts or shares, as 1,10%,100%")
        share = word.strip().endswith("%")
        ends.append(math.ceil(len(hosts) * int(number) / 100) if share else int(number))
    if ends[-1] < len(hosts):
        raise UsageError(f"--waves {text} ends at {ends[-1]} of {len(hosts)} hosts", "end with 100%")
    found, start = [], 0
    for end in ends:
        if start < len(hosts):
            found.append(list(hosts[start : max(end, start + 1)]))
            start += len(found[-1])
    return found
