"""Profiles and targets as YAML files: found, read, and what is wrong with one named by file, line and key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from toolkit import units
from toolkit.config import Profile, Target
from toolkit.errors import UsageError

_File = TypeVar("_File", Profile, Target)


class _Loader(yaml.SafeLoader):
    """Takes ``on`` and ``off``, ``yes`` and ``no`` for words, as YAML 1.2 does."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("true|false|True|False|TRUE|FALSE"), list("tfTF")
)


def folders(kind: str) -> Iterator[Path]:
    """Yield the folders of ``profiles`` or ``targets``: the working folder's first, then the shipped ones."""
    yield Path.cwd() / kind
    package = Path(__file__).parent
    shipped = package / "shipped" / kind
    yield shipped if shipped.is_dir() else package.parent / kind


def names(kind: str) -> dict[str, Path]:
    """Return every profile or target by name; the user's own hides a shipped one of the same name."""
    found: dict[str, Path] = {}
    for folder in folders(kind):
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def load_profile(name: str) -> Profile:
    """Load a profile by name; raises UsageError naming file, line and key."""
    return _load(Profile, "profiles", name)


def load_target(name: str) -> Target:
    """Load a target by name; raises UsageError naming file, line and key."""
    return _load(Target, "targets", name)


def _load(model: type[_File], kind: str, name: str) -> _File:
    known = names(kind)
    if name not in known:
        raise UsageError(f"no {kind[:-1]} is called '{name}'", units.nearest(name, list(known)))
    return read_file(model, known[name])


def read_file(model: type[_File], path: Path) -> _File:
    """Read and check one YAML file; its ``name`` is the file's.

    Raises:
        UsageError: The file cannot be read, is not YAML, or a key or value is wrong (file, line, key).
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        content = yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}", "check the path and its permissions") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = error.problem or error.context or "not YAML"
        raise UsageError(f"{path}:{line}: {problem}", "correct the YAML there") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}", "correct the YAML there") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}:1: a table of keys is expected here", "see the README in its folder")
    _refuse_duplicates(path, node)
    if "name" in content:
        line = _line(node, ("name",))
        raise UsageError(f"{path}:{line}: 'name' is the file's own name", "remove the key")
    try:
        return model.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        lines = [_explain(model, path, node, problem) for problem in error.errors(include_url=False)]
        raise UsageError("\n".join(lines), f"every key is explained in {path.parent.name}/README.md") from None


def _explain(model: type[BaseModel], path: Path, node: yaml.Node | None, problem: Any) -> str:
    loc = tuple(part for part in problem["loc"] if isinstance(part, (str, int)))
    where = f"{path}:{_line(node, loc)}"
    key = ".".join(str(part) for part in loc)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'; {units.nearest(str(loc[-1]), _known_keys(model, loc[:-1]))}"
    if problem["type"] == "missing":
        return f"{where}: the key '{key}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return f"{where}: {message}"
    return f"{where}: {key}: {message[0].lower()}{message[1:]} (found {problem['input']!r})"


def _known_keys(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            return []
        model = field.annotation
    return [key for key in model.model_fields if key != "name"]


def _line(node: yaml.Node | None, loc: tuple[str | int, ...]) -> int:
    """Return the line (from 1) of the deepest key of ``loc`` that stands in the file."""
    line = 1
    for part in loc:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
            continue
        if not isinstance(node, yaml.MappingNode):
            break
        entry = next(((k, v) for k, v in node.value if k.value == part), None)
        if entry is None:
            break
        line, node = entry[0].start_mark.line + 1, entry[1]
    return line


def _refuse_duplicates(path: Path, node: yaml.Node | None) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            line = key.start_mark.line + 1
            raise UsageError(f"{path}:{line}: '{key.value}' stands here a second time", "keep one of the two")
        seen.add(key.value)
        _refuse_duplicates(path, value)
