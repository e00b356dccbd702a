"""Configurations of models that are known by their shape alone, for `elastic plan` and `elastic bench`. Of a plan's,
mistakes are found before torch is imported."""

from __future__ import annotations

from typing import Any

from elastic import families
from elastic.config import RunConfig, make_config
from teachers.registry import ModelEntry
from teachers.shapes import find_shape


def plan_config(name: str, *, settings: list[str] | None = None, **flags: Any) -> RunConfig:
    """Return the configuration of a run with a model of this shape, from settings and flags as for `make_config`."""
    entry = ModelEntry(name, family=find_shape(name).family, data="any")
    return make_config(entry=entry, settings=settings, model=name, **flags)


def shape_config(name: str, *, settings: list[str] | None = None, **flags: Any) -> RunConfig:
    """Return the configuration of a model with random weights and data, by its shape's name; see `make_config`."""
    shape = find_shape(name)
    entry = ModelEntry(name, family=shape.family, data="random")
    random: dict[str, Any] = dict(families.of(shape.family).timing.RANDOM)
    return make_config(entry=entry, settings=settings, model=name, **random, **flags)
