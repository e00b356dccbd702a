"""Every family of models has all members of the protocols of a family."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from elastic import families
from elastic.traits import TRAITS

ROOT = Path(__file__).parents[2]


def members(protocol: type) -> set[str]:
    """Return the names of a protocol's public attributes and methods."""
    return {name for name in (*protocol.__annotations__, *vars(protocol)) if not name.startswith("_")}


@pytest.mark.parametrize("name", TRAITS)
def test_a_family_answers_everything(name: str) -> None:
    family = families.of(name)
    parts = [(families.Family, family), (families.Timing, family.timing)]
    parts += [(families.Generation, family.generation)] if family.generation is not None else []
    for protocol, module in parts:
        assert isinstance(module, ModuleType)
        assert not [member for member in members(protocol) if not hasattr(module, member)]


@pytest.mark.parametrize("package", ["elastic", "students", "teachers"])
def test_no_module_asks_which_family_it_is(package: str) -> None:
    asking = re.compile(r"\bfamily (==|!=|in|not in) ")
    modules = [path for path in (ROOT / package).rglob("*.py") if asking.search(path.read_text(encoding="utf-8"))]
    assert not modules
