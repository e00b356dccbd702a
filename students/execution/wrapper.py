"""Modules that wrap a frozen model's own: they hold the original as `base_layer` and never copy its forward.

Each executes in two modes with the same result (see Runtime.execution): mask closed parts, or leave them out.
"""

from __future__ import annotations

from collections.abc import ItemsView, ValuesView
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import nn

from students.execution.runtime import Runtime

M = TypeVar("M", bound=nn.Module)


class Named(nn.ModuleDict, Generic[M]):
    """Modules of one type, by name."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> M: ...
        def items(self) -> ItemsView[str, M]: ...
        def values(self) -> ValuesView[M]: ...

    def get(self, key: str) -> M | None:
        """The module of this name, or None."""
        return self[key] if key in self else None  # noqa: SIM401


class Wrapper(nn.Module):
    """A module in the place of `base_layer`, which answers for attributes that the wrapper does not have."""

    def __init__(self, base_layer: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.runtime = runtime

    def lay_out(self) -> None:
        """Prepare what skip execution reads of frozen weights and corrections (see Student.prepare)."""

    def set_dial(self) -> None:
        """Prepare what skip execution reads of routers, at the current offset of the dial."""

    def pack(self) -> bool:
        """Pack the weights that skip execution reads for few tokens (kernels/packing.py), if the base layer may have
        packed weights. Return whether the base layer itself then needs none."""
        return False

    def packs_alone(self) -> bool:
        """Return whether `pack` makes weights that are read with any number of rows."""
        return False

    def forget(self) -> None:
        """Undo `lay_out` and `set_dial`; frozen weights get the memory layout that the model had."""

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__.get("_modules", {})
        if name in own:  # same result as below, but faster
            return own[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
