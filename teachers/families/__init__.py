"""Families of models: how each is loaded. No other module of this package asks which family a model is of."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

_MODULES = {
    "llm": "teachers.families.language",
    "vit": "teachers.families.image",
    "vlm": "teachers.families.vision_language",
}


class Loaded(NamedTuple):
    """A model with what belongs to it."""

    model: nn.Module
    processor: Any
    """What turns raw inputs into the model's (see Teacher.processor)."""
    unused: Sequence[str] = ()
    """Names of weights that the model has no place for."""
    note: str = ""
    """What is to be said of the source besides the folder, for the user to read."""


class Family(Protocol):
    """What every family's module has."""

    def load(self, name: str, folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Loaded:
        """The model in a folder, by its config.json and safetensors weights; ValueError of one line, which starts with
        `name`, where something is wrong."""

    def random_model(self, settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        """A model of a shape (see configs/shapes.yaml), its random weights on the device that is the default."""


def of(family: str) -> Family:
    """The module of a family: "llm", "vit" or "vlm"."""
    return cast(Family, import_module(_MODULES[family]))
