"""The one door to local processes: logs the exact command, ends what it started."""

from __future__ import annotations

import contextlib
import logging
import shlex
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolkit.errors import StageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """What a process left behind."""

    returncode: int
    stderr: str


_GRACE = 5.0  # seconds that a process has to end what it started itself


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run(
    argv: Sequence[str],
    *,
    stdin: str = "",
    on_line: Callable[[str], None] = lambda line: None,
    timeout: float | None = None,
) -> Finished:
    """Run a program, hand each line of its stdout to ``on_line``, and wait for it.

    Args:
        argv: Program and arguments; no shell is involved.
        stdin: Text for its standard input.
        on_line: Called with each line as it comes, without the line end.
        timeout: Seconds until it is ended.

    Raises:
        StageError: It cannot be started, or runs past ``timeout``.
    """
    log.info("run: %s", shlex.join(argv))
    try:
        process = subprocess.Popen(
            list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise StageError(f"cannot start {argv[0]}: {error.strerror}", "check that it is installed") from error
    stderr: list[str] = []
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(timeout, expire) if timeout else None
    drain = threading.Thread(target=lambda: stderr.extend(process.stderr or ()), daemon=True)
    drain.start()
    if timer:
        timer.start()
    try:
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(stdin)
            process.stdin.close()
        except BrokenPipeError:
            log.info("%s ended before it had read its input", argv[0])
        for line in process.stdout:
            on_line(line.rstrip("\n"))
        returncode = process.wait()
    finally:
        if timer:
            timer.cancel()
        if process.poll() is None:
            _end(process)
        drain.join(timeout=5)
    if expired.is_set():
        raise StageError(f"{argv[0]} did not end within {timeout:g} s", "look at the device's load")
    return Finished(returncode, "".join(stderr))


def attach(argv: Sequence[str]) -> int:
    """Run a program on this terminal's own streams, wait for it, and return its exit status.

    Ctrl-C reaches the program by itself; it is given time to end.
    """
    log.info("run: %s", shlex.join(argv))
    process = subprocess.Popen(list(argv))
    try:
        return process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
