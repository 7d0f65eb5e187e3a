"""How long `toolkit --help` and an unchanged run take, as whole commands.

    python benchmarks/startup.py [RUNS]

Runs the demo in a temporary folder first, so that there is something to reuse.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time


def seconds(command: list[str], folder: str) -> float:
    begin = time.monotonic()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.monotonic() - begin


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    toolkit = [sys.executable, "-m", "toolkit"]
    with tempfile.TemporaryDirectory() as folder:
        first = seconds([*toolkit, "run", "host-cpu"], folder)
        print(f"toolkit run host-cpu, from nothing: {first:.1f} s")
        for name, arguments in (("--help", ["--help"]), ("unchanged run", ["run", "host-cpu"])):
            taken = [seconds([*toolkit, *arguments], folder) for _ in range(runs)]
            low, middle, high = min(taken), statistics.median(taken), max(taken)
            print(f"toolkit {name}: min {low:.3f} s, median {middle:.3f} s, max {high:.3f} s ({runs} runs)")


if __name__ == "__main__":
    main()
