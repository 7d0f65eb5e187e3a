"""Deliveries that are killed and cut off: python benchmarks/delivery_faults.py [FAULTS [SEED]].

Needs root, sshd and ip. Devices in network namespaces of their own get one of several releases after the other,
pushed, made current and pruned by a process of its own. Most are disturbed at a random moment: the host's process,
the device's sshd session or its agent is killed with SIGKILL, or the link is cut for less or more time than the
host waits. What did not complete is run again until it does. All the time a watcher on each device hashes its
current release.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.faults import disturb, table
from tests.network import Network

DEVICES = 8


def main(count: int, seed: int) -> int:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Network() as network:
        tally = disturb(network, Path(folder), DEVICES, count, seed)
    seconds = time.monotonic() - started
    ended = ", ".join(f"{number} {how}" for how, number in tally.ended.most_common())
    print(f"seed {seed}: {sum(tally.faults.values())} faults on {DEVICES} devices in {seconds:.0f} s")
    print(table(tally))
    print(f"{sum(tally.ended.values())} commands: {ended}; the watchers looked {tally.looks:,} times")
    print(f"{len(tally.wrong)} broken or mixed releases, hung or crashed commands", *tally.wrong, sep="\n")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    sys.exit(main(numbers[0] if numbers else 200, numbers[1] if len(numbers) > 1 else time.time_ns() % 1_000_000))
