"""Products over the first rows of what they are given, of which the device alone knows how many there are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def possible(x: Tensor, outputs: int) -> bool:
    """Whether nothing waits for that number: torch's grouped product takes it from the device in bfloat16 on Hopper,
    where rows begin at multiples of 16 bytes, and asks the host for it elsewhere."""
    fits = x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0 == outputs % 8
    return fits and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, number: Tensor) -> Tensor:
    """F.linear for the first rows of x [N, I], and anything in those behind: [N, O]; number [1], int32."""
    out = F.grouped_mm(x, weight.T.unsqueeze(0), offs=number)
    return out if bias is None else out.add_(bias)
