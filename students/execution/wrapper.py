"""Modules that stand in front of a frozen model's own: they hold `base_layer` and never copy its forward.

Each executes in two ways (see Runtime.execution) that agree: as masks, and by leaving out what is closed.
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
    """A module in place of another; unknown attributes are the other's."""

    def __init__(self, base_layer: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.runtime = runtime

    def lay_out(self) -> None:
        """Prepare what skip execution reads of frozen weights and corrections (see Student.prepare)."""

    def set_dial(self) -> None:
        """Prepare what it reads of routers at the offset that the dial has now."""

    def pack(self) -> bool:
        """Pack weights that it reads for few tokens (kernels/packing.py), where its base layer may have packed ones;
        whether it then has no use for those of its base layer."""
        return False

    def forget(self) -> None:
        """Undo both: the frozen weights lie as the model had them."""

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__.get("_modules", {})
        if name in own:  # as ever, for less
            return own[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
