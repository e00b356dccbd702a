"""Low-rank corrections of linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.routers.base import Added


class Lora(Added):
    """Low-rank correction of one linear layer (LoRA, arXiv 2106.09685): zero at the start."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return the correction [..., out] of the layer's output for the layer's input x [..., in]."""
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
