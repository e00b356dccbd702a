"""When tensors that were made from weights and settings are stale and must be made again: one rule for all of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from students.shards import unit_of


class Stamp:
    """The sources of a prepared tensor, to tell whether it is stale: whether since its preparation a source tensor was
    written to, moved or replaced, or a setting has changed. (Writes to tensors of inference mode go unnoticed, because
    torch does not count them.)"""

    def __init__(self) -> None:
        self._made_of: tuple[Hashable, ...] | None = None

    def renew(self, tensors: Sequence[Tensor], *settings: Hashable) -> bool:
        """Return whether these sources differ from the stored ones, and store them: where True, the caller prepares."""
        made_of = self._of(tensors, settings)
        if made_of == self._made_of:
            return False
        self._made_of = made_of
        return True

    def holds(self, tensors: Sequence[Tensor], *settings: Hashable) -> bool:
        """Return whether these sources equal the stored ones; nothing is stored."""
        return self._of(tensors, settings) == self._made_of

    @staticmethod
    def _of(tensors: Sequence[Tensor], settings: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
        return (*[(_place(x), None if x.is_inference() else x._version) for x in tensors], *settings)

    def reset(self) -> None:
        """Forget the sources, so that the next `renew` returns True."""
        self._made_of = None


def _place(x: Tensor) -> Hashable:
    """Return what identifies a tensor: its address, or for a weight that is spread over processes, whose memory is
    released and allocated again (students/shards.py), the tensor object."""
    return x.data_ptr() if unit_of(x) is None else id(x)


class InPrecision:
    """Casts parameters to another dtype; without gradients the copies are kept until a parameter changes."""

    def __init__(self) -> None:
        self._stamp = Stamp()
        self._kept: list[Tensor] = []

    def __call__(self, dtype: torch.dtype, *parameters: Tensor) -> list[Tensor]:
        """Return the parameters in this dtype."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return [x.to(dtype) for x in parameters]
        if self._stamp.renew(parameters, dtype):
            self._kept = [x.detach().to(dtype) for x in parameters]
        return self._kept

    def __deepcopy__(self, memo: dict[int, Any]) -> InPrecision:
        return InPrecision()


def writes(tensors: Sequence[Tensor]) -> int:
    """Return the number of writes to these tensors: one setting of a Stamp in place of many tensors, for tensors that
    stay where they are or move together."""
    return sum(x._version for x in tensors)
