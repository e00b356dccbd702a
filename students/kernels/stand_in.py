"""Modules that replace a frozen module and have its parameters, buffers and hooks under the same names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def stand_in(module: nn.Module, plain: nn.Module) -> None:
    """Initialise `module` as a replacement of `plain`, with the same parameters, buffers and hooks. The replacement
    holds `plain` as an attribute; putting `plain` back into the model undoes the replacement."""
    nn.Module.__init__(module)
    module.__dict__.update(plain.__dict__)  # parameters, buffers and hooks are in the same dictionaries
    module.__dict__["plain"] = plain  # not registered as a submodule, so that each parameter has one name


def exchange(model: nn.Module, found: Mapping[nn.Module, nn.Module]) -> None:
    """Replace each module that is a key of `found` with its value, in every place that the module has in the model."""
    for parent in [module for module in model.modules() if module not in found]:
        for name, child in parent._modules.items():  # a module may stand in several places
            if child is not None and child in found:
                setattr(parent, name, found[child])
