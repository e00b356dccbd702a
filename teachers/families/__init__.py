"""Families of models, each with its own loader. No other module of this package asks which family a model is of."""

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
    """A model with its processor and remarks on its weights."""

    model: nn.Module
    processor: Any
    """Converts raw inputs to the model's inputs (see Teacher.processor)."""
    unused: Sequence[str] = ()
    """Names of checkpoint weights that the model does not use."""
    note: str = ""
    """Text to append to the description of the model's source, for the user to read."""


class Family(Protocol):
    """The functions that every family's module has."""

    def load(self, name: str, folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Loaded:
        """Load the model in a folder from its config.json and safetensors weights.

        Raises a one-line ValueError, starting with `name`, if that fails.
        """

    def random_model(self, settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        """Return a model of a shape (see configs/shapes.yaml) with random weights on torch's default device."""


def of(family: str) -> Family:
    """Return the module of a family: "llm", "vit" or "vlm"."""
    return cast(Family, import_module(_MODULES[family]))
