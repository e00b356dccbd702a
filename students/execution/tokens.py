"""Some of a batch's tokens, by their places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def take(values: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Values [B or 1, T or 1, N] of the tokens x [B, T, D], for the flat rows only: [1, n, N]."""
    return values.expand(*x.shape[:2], -1).flatten(0, 1).index_select(0, rows).unsqueeze(0)


def scatter_rows(some: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count, ...]: what some [N, ...] holds at rows [N], zeros elsewhere; on CPUs faster than copying into zeros."""
    place = rows.new_full((count,), len(some)).index_copy_(0, rows, torch.arange(len(some), device=rows.device))
    return torch.cat([some, some.new_zeros(1, *some.shape[1:])]).index_select(0, place)


def gather_open(open_: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where the open tokens of open_ [B, T] are: index [B, k], k the most that any row has (at least 1), the open ones
    first; and which of them are open [B, k], None where all are."""
    counts = open_.sum(1)
    most = max(1, int(counts.max()))  # waits for the device
    index = open_.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    valid = torch.arange(most, device=open_.device) < counts[:, None]
    return index, None if bool(valid.all()) else valid


def flat_index(index: Tensor, tokens: int) -> Tensor:
    """[B * k]: where the tokens at index [B, k] are once batch and tokens [B, tokens] are one dimension."""
    if len(index) == 1:
        return index.flatten()
    return (index + tokens * torch.arange(len(index), device=index.device)[:, None]).flatten()


def for_tokens(kwargs: dict[str, Any], index: Tensor, prefix: int) -> dict[str, Any]:
    """What a block of an image model is called with, for the tokens at index [B, k] only, which begins with the prefix.

    Rotary embeddings (timm's `rope`) hold patches alone, [..., N, C]; they become [B, 1 or heads, k - prefix, C].
    """
    rope = kwargs.get("rope")
    if rope is None:
        return kwargs
    rope = rope if rope.ndim > 2 else rope.unsqueeze(0)
    return {**kwargs, "rope": rope[:, index[:, prefix:] - prefix].transpose(0, 1)}
