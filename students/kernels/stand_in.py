"""Modules that stand where a frozen one stood, with its parameters, buffers and hooks, under the same names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def stand_in(module: nn.Module, plain: nn.Module) -> None:
    """Make a module that was not initialised stand in for `plain`, which it holds, and which undoes this where it is
    put back."""
    nn.Module.__init__(module)
    module.__dict__.update(plain.__dict__)  # parameters, buffers and hooks are in the same dictionaries
    module.__dict__["plain"] = plain  # no submodule, so that parameters have one name


def exchange(model: nn.Module, found: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules into the places of those that are keys, wherever these stand in the model."""
    for parent in [module for module in model.modules() if module not in found]:
        for name, child in parent._modules.items():  # a module may stand in several places
            if child is not None and child in found:
                setattr(parent, name, found[child])
