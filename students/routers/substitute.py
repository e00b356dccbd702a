"""What stands in for a branch that is closed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Substitute(nn.Module):
    """Rank-r affine map of the branch's input that stands in for the branch; zero until fitted or trained."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.up = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        kind = x.dtype
        return F.linear(F.linear(x, self.down.to(kind)), self.up.to(kind), self.bias.to(kind))

    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.down.numel() + self.up.numel()
