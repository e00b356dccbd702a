"""The gates that a router decided, in the forms that execution needs."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Gates:
    """Gates of one router, [B, T, N] or [B, 1, N]; each form is computed when it is first read."""

    def __init__(
        self, dtype: torch.dtype, count: int | None = None, listed: list[Tensor] | None = None, **forms: Tensor
    ) -> None:
        """forms: either `open`, or `gate` and `closed` in this dtype; `gate` and `closed` made later have it too."""
        self._dtype = dtype
        self.count = count
        """Number of open tokens in each row, if it is known without reading the gates; otherwise None."""
        self.listed = listed
        """Places of the open tokens: the last three results of `ops.list_open`, if it has run; otherwise None."""
        self.__dict__.update(forms)

    @cached_property
    def open(self) -> Tensor:
        """Whether each gate is open, bool."""
        return self.closed == 0

    @cached_property
    def gate(self) -> Tensor:
        """Factor of the branch's output: 1, or the router's weight, where open; 0 where closed."""
        return self.open.to(self._dtype)

    @cached_property
    def closed(self) -> Tensor:
        """Factor of the substitute's output: 1 where closed, 0 where open."""
        return 1 - self.gate
