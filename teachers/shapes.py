"""Models with random weights, in shapes that are listed: for timing what has not been downloaded."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml

from teachers import families
from teachers.quiet import quiet

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Shape:
    """What a model with random weights is built from; see configs/shapes.yaml."""

    name: str
    family: str
    config: dict[str, Any] | None = None
    timm: dict[str, Any] | None = None


@functools.cache
def shapes() -> Mapping[str, Shape]:
    """The table of shapes, `configs/shapes.yaml`, in its order."""
    table = yaml.safe_load(resources.files("configs").joinpath("shapes.yaml").read_text("utf-8"))
    return MappingProxyType({name: Shape(name, **record) for name, record in table.items()})


def find_shape(name: str) -> Shape:
    """The shape of this name; ValueError where there is none."""
    if name in shapes():
        return shapes()[name]
    near = difflib.get_close_matches(name.lower(), shapes(), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"no shape is called {name!r}{hint}; there are {', '.join(shapes())}")


def build(shape: Shape, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """A frozen model of this shape in eval mode, its random weights made where and as they are used.

    On the device "meta" it has sizes and nothing else.
    """
    import torch

    with torch.device(device), quiet():
        model = families.of(shape.family).random_model(shape.config or shape.timm or {}, dtype)
    return model.eval().requires_grad_(False)
