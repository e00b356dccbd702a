"""Low-rank maps: corrections of linear layers, and what replaces a closed branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.kernels import direct
from students.prepared import InPrecision
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


class Substitute(Added):
    """Rank-r affine map of a branch's input that replaces the closed branch; zero until fitted or trained."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.up = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self._precise = InPrecision()

    def forward(self, x: Tensor) -> Tensor:
        """Return the substitute [..., D] of the branch's output for the branch's input x [..., D], in x's dtype."""
        return self.of(x.flatten(0, -2), None).view(x.shape)

    def of(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Return the substitutes [n, D] of the tokens `rows` [n] (None: all) of x [N, D]."""
        down, up, bias = self.parts(x.dtype)
        out: Tensor = direct.thin_product(direct.thin_product(x, rows, down, None), None, up, bias)
        return out

    def parts(self, dtype: torch.dtype) -> list[Tensor]:
        """Return down [r, D], up [D, r] and bias [D] in this dtype."""
        return self._precise(dtype, self.down, self.up, self.bias)

    def macs(self) -> int:
        """Return the multiply-accumulates for one token."""
        return self.down.numel() + self.up.numel()
