"""What a model's definition and checkpoint consist of, found without importing PyTorch."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

from toolkit.errors import UsageError
from toolkit.store import canonical, sha256_file, sha256_text
from toolkit.workload import TORCHVISION, Model


def identify(model: Model) -> dict[str, Any]:
    """Return what identifies a model for an artifact's key: its name, its source files, its checkpoint.

    A factory of the user's is identified by the content of its module and of every module that this imports
    from the working folder.

    Raises:
        UsageError: The factory's module cannot be found.
    """
    found: dict[str, Any] = {"source": model.source, "name": model.name}
    if model.weights == TORCHVISION:
        found["weights"] = TORCHVISION  # which ones they are is its version's to say
    elif model.weights is not None:
        found["weights"] = sha256_file(Path(model.weights))
    if model.source == "torchvision":
        found["torchvision"] = importlib.metadata.version("torchvision")
    if model.source == "factory":
        found["code"] = sha256_text(canonical([sha256_file(path) for path in files_of(model)]))
    return found


def files_of(model: Model) -> list[Path]:
    """Return the file of a factory's module and those in the working folder that it imports, directly or not.

    Raises:
        UsageError: The module cannot be found.
    """
    module, here = model.name.partition(":")[0], Path.cwd()
    if str(here) not in sys.path:
        sys.path.insert(0, str(here))
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{module}.".startswith(f"{missing.name}."):
            raise UsageError(
                f"'{module}' does not import: {missing}", "install it, or correct the import"
            ) from missing
        spec = None
    except Exception as error:  # whatever the user's packages do when they are imported
        raise UsageError(f"'{module}' does not import: {type(error).__name__}: {error}", "correct it") from error
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UsageError(
            f"the module '{module}' cannot be found from {here}",
            "run where it can be imported, or install it",
        )
    first = Path(spec.origin).resolve()
    seen = {first}
    waiting = [first]
    while waiting:
        for path in _local_imports(waiting.pop(), here):
            if path not in seen:
                seen.add(path)
                waiting.append(path)
    return sorted(seen)


def _local_imports(path: Path, root: Path) -> set[Path]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid Python: {error}", "correct it") from error
    dotted: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = path.parent
            for _ in range(node.level - 1):
                base = base.parent
            prefix = ""
            if node.level and base.is_relative_to(root):
                prefix = ".".join(base.relative_to(root).parts)
            name = ".".join(part for part in (prefix, node.module or "") if part)
            dotted |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    found = set()
    for name in dotted:
        stem = root.joinpath(*name.split("."))
        for candidate in (stem.with_suffix(".py"), stem / "__init__.py"):
            if name and candidate.is_file():
                found.add(candidate.resolve())
    return found
