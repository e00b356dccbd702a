"""When something that was made of weights and settings has to be made again: the one rule for all of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from students.shards import unit_of


class Stamp:
    """What prepared state was made of: it is stale once one of these tensors has been written to, moved or replaced, or
    a setting has changed. (Tensors of inference mode count no writes.)"""

    def __init__(self) -> None:
        self._made_of: tuple[Hashable, ...] | None = None

    def renew(self, tensors: Sequence[Tensor], *settings: Hashable) -> bool:
        """Whether what was prepared last is stale. From now on it is what is made of these."""
        made_of = self._of(tensors, settings)
        if made_of == self._made_of:
            return False
        self._made_of = made_of
        return True

    def holds(self, tensors: Sequence[Tensor], *settings: Hashable) -> bool:
        """Whether what was prepared last is made of these."""
        return self._of(tensors, settings) == self._made_of

    @staticmethod
    def _of(tensors: Sequence[Tensor], settings: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
        return (*((_place(x), None if x.is_inference() else x._version) for x in tensors), *settings)

    def reset(self) -> None:
        """Nothing is prepared."""
        self._made_of = None


def _place(x: Tensor) -> Hashable:
    """Where a tensor is: in memory, or the weight of a unit that comes and goes."""
    return x.data_ptr() if unit_of(x) is None else id(x)


class InPrecision:
    """Parameters in another precision: kept while no gradient is wanted, and made again once they have changed."""

    def __init__(self) -> None:
        self._stamp = Stamp()
        self._kept: list[Tensor] = []

    def __call__(self, dtype: torch.dtype, *parameters: Tensor) -> list[Tensor]:
        """The parameters in this precision."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return [x.to(dtype) for x in parameters]
        if self._stamp.renew(parameters, dtype):
            self._kept = [x.detach().to(dtype) for x in parameters]
        return self._kept

    def __deepcopy__(self, memo: dict[int, Any]) -> InPrecision:
        return InPrecision()


def writes(tensors: Sequence[Tensor]) -> int:
    """How often these tensors, which stay where they are or move together, have been written to: a setting that stands
    for many of them."""
    return sum(x._version for x in tensors)
