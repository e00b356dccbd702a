"""Scores of tokens of the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

FEW_TOKENS = 1024


def stream_score(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a linear map, weight [D] and bias [1], makes of tokens x [B, T, D] over their root mean square: [B, T]."""
    # for few tokens a product of bfloat16 takes longer than one of float32, and a norm longer than either
    kind = torch.float32 if x.shape[:-1].numel() <= FEW_TOKENS else x.dtype
    return (x.to(kind) @ weight.to(kind)).float() * per_size(x) + bias


def per_size(x: Tensor) -> Tensor:
    """One over the root mean square of tokens x [B, T, D]: [B, T], float32."""
    size: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).float()
    return float(x.shape[-1] ** 0.5) / size.clamp(min=1e-6)
