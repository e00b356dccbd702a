"""Router scores of tokens in the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

FEW_TOKENS = 1024
"""Up to this many tokens, scores are computed in float32."""


def stream_score(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return scores [B, T]: a linear map (weight [D], bias [1]) of tokens x [B, T, D] over their root mean square."""
    # for few tokens a product in bfloat16 takes longer than one in float32, and a norm longer than either product
    kind = torch.float32 if x.shape[:-1].numel() <= FEW_TOKENS else x.dtype
    return (x.to(kind) @ weight.to(kind)).float() * per_size(x) + bias


def per_size(x: Tensor) -> Tensor:
    """Return the reciprocal of the root mean square of tokens x [B, T, D], as float32 [B, T]."""
    size: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).float()
    return float(x.shape[-1] ** 0.5) / size.clamp(min=1e-6)
