"""What a router decided."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Gates:
    """Gates of one router, [B, T, N] or [B, 1, N], each form made when it is first asked for."""

    def __init__(
        self, dtype: torch.dtype, count: int | None = None, listed: list[Tensor] | None = None, **forms: Tensor
    ) -> None:
        """forms: open, or gate and closed, in this precision."""
        self._dtype = dtype
        self.count = count
        """How many tokens of each row are open, where that is settled beforehand."""
        self.listed = listed
        """Where the open ones are, as of `ops.list_open`, where somebody has looked."""
        self.__dict__.update(forms)

    @cached_property
    def open(self) -> Tensor:
        """bool."""
        return self.closed == 0

    @cached_property
    def gate(self) -> Tensor:
        """What multiplies what passes: 1, or a weight, where open; 0 where closed."""
        return self.open.to(self._dtype)

    @cached_property
    def closed(self) -> Tensor:
        """What multiplies the substitute: 1 where closed, 0 where open."""
        return 1 - self.gate
