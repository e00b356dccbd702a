"""Converting settings between YAML files, plain data and dataclasses.

Every ValueError has a message of one line that says what is wrong.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from teachers.quiet import first_line


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as dictionaries, lists and scalars, ready for YAML or JSON."""
    return _plain(dataclasses.asdict(config))


def from_dict(kind: type, data: Any, path: str = "") -> Any:
    """Return a dataclass `kind` from plain data; `path` is the prefix of its settings in messages, such as "train.".

    Raises ValueError for unknown or missing settings and for values of the wrong type, looked at in the order of the
    dataclass's fields.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{path.rstrip('.') or 'the configuration'} is {data!r}; it must be a section of settings")
    hints = get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    for key in data:
        if key not in known:
            raise ValueError(
                f"unknown setting {path + str(key)!r}{near(str(key), known)}; there are {', '.join(known)}"
            )
    values = {key: _value(hints[key], data[key], f"{path}{key}") for key in known if key in data}
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{path.rstrip('.') or 'the configuration'} lacks {', '.join(missing)}")
    return kind(**values)


def _value(hint: Any, value: Any, path: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{path}.")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        first, *others = (a for a in args if a is not type(None))
        try:
            return _value(first, value, path)
        except ValueError:
            if type(value) not in others:
                raise
            return value
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{path} is {value!r}; it must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path} is {value!r}; it must be a list")
        return tuple(_value(args[0], item, f"{path}[{number}]") for number, item in enumerate(value))
    if hint is float and type(value) in (int, float, str):  # YAML reads 1e-3 as text
        with suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                return number
    elif type(value) is hint:
        if hint is int and abs(value) >= 2**63:  # torch counts in 64 bits
            raise ValueError(f"{path} is {value}, which is too large")
        return value
    raise ValueError(f"{path} is {value!r}; it must be {_TYPES[hint]}")


_TYPES = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false"}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def section_of(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a section of settings, empty if it is missing; raise ValueError if it is not a section."""
    section = tree.get(key, {})
    if not isinstance(section, dict):
        raise ValueError(f"{key} is {section!r}; it must be a section of settings")
    return section


def put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set a nested setting in place, such as keys ["train", "lr"], creating missing sections."""
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{'.'.join(keys)} cannot be set: {key} has a value already")
    tree[keys[-1]] = value


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Return settings `low` overridden by `high`, section by section, at every depth."""
    merged = dict(low)
    for key, value in high.items():
        merged[key] = (
            merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged


class _Unique(yaml.SafeLoader):
    """yaml's SafeLoader, which of a key that a mapping has twice would take the last value and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value]
        for number, key in enumerate(keys):
            if key.value in [other.value for other in keys[:number]]:
                problem = f"{key.value} stands twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return what YAML text stands for, in plain data; yaml.YAMLError also for a key that a mapping has twice."""
    return yaml.load(text, Loader=_Unique)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file; raise ValueError if it is missing, not YAML or not a mapping."""
    if not path.is_file():
        raise ValueError(f"no such configuration file: {path}")
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path} is not YAML: {error.problem}{place}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no settings: it needs keys such as model, budget, train")
    return data


def near(word: str, known: list[str]) -> str:
    """Return a hint " (did you mean ...?)" with the known word most similar to a misspelt one, or ""."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
