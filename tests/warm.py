"""The command line in a process of its own that begins with the heavy libraries: imports are half its work."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

# none that starts a thread when it is imported, as ONNX Runtime does: it would be missing after the fork
LIBRARIES = ["modelopt.torch.prune", "scipy.optimize", "sklearn.datasets", "torch", "torch.onnx", "torchprofile"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


def run(folder: Path, arguments: Sequence[str], env: Mapping[str, str], timeout: float) -> CompletedProcess[str]:
    """Do what ``python -m toolkit`` would.

    Args:
        folder: Where.
        arguments: Of the command line.
        env: The whole environment, but for what the libraries read when they are imported.
        timeout: Seconds after which it is killed.

    Raises:
        TimeoutExpired: It was.
    """
    with tempfile.TemporaryDirectory() as place:
        out, errors = Path(place) / "out", Path(place) / "errors"
        process = _context.Process(target=_main, args=(folder, arguments, dict(env), out, errors))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired(["toolkit", *arguments], timeout, out.read_bytes(), errors.read_bytes())
        return CompletedProcess(["toolkit", *arguments], process.exitcode, out.read_text(), errors.read_text())


def _main(folder: Path, arguments: Sequence[str], env: dict[str, str], out: Path, errors: Path) -> None:
    for descriptor, path in ((1, out), (2, errors)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["toolkit", *arguments]
    sys.path[:0] = [
        str(folder),
        *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)),
    ]  # as `python -m` has it
    from toolkit.__main__ import main

    main()
