"""The virtual environment that the agent runs on, made of wheels that the host sends: no root, no internet.

ROOT/wheels/NAME.whl      what the host has sent; hashed before it is used
ROOT/environments/NAME/   a virtual environment, and environment.json: what it is made of
ROOT/environment          symlink to the one in use, switched when the new one is whole
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from typing import Any

from . import releases
from .protocol import Refusal, progress

_DESCRIPTION = "environment.json"


def provision(request: dict[str, Any]) -> dict[str, Any]:
    """Make the environment of the given wheels and switch to it, unless that is the one in use and works.

    Args:
        request: ``root``; ``wheels`` (file name to SHA-256, pip's own among them); ``requirements`` (what they were
            chosen for); ``modules`` (what has to be importable); ``system`` (whether the environment sees the
            system's packages, such as TensorRT).

    Returns:
        ``changed``; ``missing``, the names of wheels to be sent first, in which case nothing was made;
        ``free_bytes``.

    Raises:
        Refusal: The environment cannot be made, or something in it cannot be imported; the one before stays.
    """
    root, wheels, modules = request["root"], request["wheels"], request["modules"]
    wanted = {key: request[key] for key in ("wheels", "requirements", "modules", "system")}
    wanted["python"] = [sys.executable, *sys.version_info[:2]]
    link = os.path.join(root, "environment")
    with releases.locked(root):
        _clear(os.path.join(root, "environments"), keep=[os.path.basename(os.path.realpath(link))])
        answer = {"changed": False, "missing": [], "free_bytes": shutil.disk_usage(root).free}
        if _described(link) == wanted and _import(link, modules) is None:
            return answer
        folder = os.path.join(root, "wheels")
        missing = [name for name, known in wheels.items() if not _is(os.path.join(folder, name), known)]
        if missing:
            return dict(answer, missing=missing)
        # every attempt has a name of its own: what a killed one still writes cannot get into this one
        content = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
        made = os.path.join(root, "environments", "{}-{}".format(content, os.getpid()))
        _make(made, [os.path.join(folder, name) for name in wheels], request["system"])
        problem = _import(made, modules)
        if problem is not None:
            raise Refusal(
                "the new environment does not work: {}".format(problem), "give other wheels with --wheels DIR"
            )
        with open(os.path.join(made, _DESCRIPTION), "w", encoding="utf-8") as file:
            json.dump(wanted, file, indent=1, sort_keys=True)
        os.sync()
        _point(link, made)
        _clear(os.path.join(root, "environments"), keep=[os.path.basename(made)])
        _clear(folder, keep=list(wheels))
    return dict(answer, changed=True)


def _described(environment: str) -> Any:
    """Return what an environment is made of, or None where there is none."""
    try:
        with open(os.path.join(environment, _DESCRIPTION), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _is(path: str, known: str) -> bool:
    return os.path.isfile(path) and releases.digest(path) == known


def _make(folder: str, wheels: list[str], system: bool) -> None:
    progress(0, 0, "making the environment")
    (pip,) = (path for path in wheels if os.path.basename(path).startswith("pip-"))
    site = ["--system-site-packages"] if system else []
    # Debian's Python has no ensurepip: pip runs from its own wheel
    problem = _problem([sys.executable, "-m", "venv", "--without-pip", *site, folder])
    if problem is not None:
        raise Refusal(
            "no environment can be made: {}".format(problem),
            "the Python there has to be whole, with its module venv; python in the target file names another",
        )
    progress(0, 0, "installing {} packages".format(len(wheels) - 1))
    quiet = ["--isolated", "--quiet", "--disable-pip-version-check", "--no-cache-dir", "--no-warn-script-location"]
    packages = [path for path in wheels if path != pip]
    problem = _problem(
        [_python(folder), "-I", os.path.join(pip, "pip"), "install", *quiet, "--no-index", *packages]
    )
    if problem is not None:
        raise Refusal(
            "the wheels cannot be installed: {}".format(problem),
            "free space there, or give other wheels with --wheels DIR",
        )


def _problem(argv: list[str]) -> str | None:
    """Run a program; returns the last line of what it says when it fails."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(os.environ, PIP_CONFIG_FILE=os.devnull),
        check=False,
    )
    if done.returncode == 0:
        return None
    said = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return said[-1] if said else "exit status {}".format(done.returncode)


def _import(environment: str, modules: list[str]) -> str | None:
    """Return why not all the modules can be imported in an environment, or None when they can."""
    try:
        return _problem([_python(environment), "-I", "-c", "import {}".format(", ".join(modules))])
    except OSError as error:
        return str(error)


def _python(environment: str) -> str:
    return os.path.join(environment, "bin", "python")


def _point(link: str, environment: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(link + ".new")
    os.symlink(os.path.join("environments", os.path.basename(environment)), link + ".new")
    os.replace(link + ".new", link)
    releases.sync(os.path.dirname(link))


def _clear(folder: str, keep: list[str]) -> None:
    """Remove what is in a folder, all but some names."""
    os.makedirs(folder, exist_ok=True)
    for name in set(os.listdir(folder)) - set(keep):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
