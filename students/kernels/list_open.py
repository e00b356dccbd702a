"""The reference of the operator that decides which tokens are open and lists them."""

from __future__ import annotations

import torch
from torch import Tensor


def list_open(score: Tensor, bias: Tensor | None, limit: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `ops.list_open` returns, computed with torch's operators."""
    score = score if bias is None else score + bias
    open_ = score.clone() if limit is None else score >= limit
    upto = open_.flatten().cumsum(0, dtype=torch.int32)
    numbers = torch.arange(1, len(upto) + 1, dtype=torch.int32, device=upto.device)
    return open_.contiguous(), torch.searchsorted(upto[:-1], numbers), upto - open_.flatten().int(), upto
