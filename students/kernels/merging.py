"""Patches that leave are taken in by the patch most like them, as ToMe merges pairs (arXiv 2210.09461).

Which go is a router's choice, and only patches in every other place may go at a time, each to one of the others: nobody
is taken in by a patch that goes itself. Shapes: B images, n tokens, a prefix in front that neither goes nor takes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NOT_NOW = 1e29
"""The score of a patch that others may merge into, for as long as it has no other."""


@dataclass
class Matches:
    """Who could go where."""

    may_go: Tensor
    """[B, n] bool."""
    target: Tensor
    """[B, n]: the token that would take each in; itself where it may not go."""
    distance: Tensor
    """[B, n]: log of how unlike the two are, 1 - cosine; 0 where a token may not go."""


@torch.no_grad()
def match(
    x: Tensor, prefix: int, here: Tensor | None = None, every: bool = False, lengths: Tensor | None = None
) -> Matches:
    """The most similar partners among tokens x [B, n, D]; here [B, n] bool: those that are still there; or the first
    so many of each image: lengths [B].

    every: each patch may go, to any other.
    """
    n = x.shape[1]
    unit = F.normalize(x[:, prefix:].float(), dim=-1)
    may_go = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    target = torch.arange(n, device=x.device).repeat(len(x), 1)
    distance = torch.zeros(x.shape[:2], device=x.device)
    if n - prefix < 2:
        return Matches(may_go, target, distance)
    if here is None and not every:
        cosine, goes = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2), torch.ones_like(may_go[:, prefix::2])
        if lengths is not None:
            there = torch.arange(n, device=x.device) < lengths[:, None]
            cosine = cosine.masked_fill(~there[:, None, prefix + 1 :: 2], -torch.inf)
            goes = there[:, prefix::2] & there[:, prefix + 1, None]
        best, partner = cosine.max(-1)
        may_go[:, prefix::2] = goes
        target[:, prefix::2] = torch.where(goes, prefix + 1 + 2 * partner, target[:, prefix::2])
        distance[:, prefix::2] = torch.where(goes, _distance(best), 0.0)
        return Matches(may_go, target, distance)
    cosine = unit @ unit.transpose(1, 2)
    if every or here is None:
        goes = takes = torch.ones(cosine.shape[:2], dtype=torch.bool, device=x.device)
        cosine.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    else:
        here = here[:, prefix:]
        odd = here.cumsum(1) % 2 == 0  # places among those that are here, counted from zero
        goes, takes = here & ~odd, here & odd
    best, partner = cosine.masked_fill(~takes[:, None, :], -torch.inf).max(-1)
    goes = goes & takes.any(1, keepdim=True)
    may_go[:, prefix:] = goes
    target[:, prefix:] = torch.where(goes, prefix + partner, target[:, prefix:])
    distance[:, prefix:] = torch.where(goes, _distance(best), 0.0)
    return Matches(may_go, target, distance)


def _distance(cosine: Tensor) -> Tensor:
    return (1 - cosine).clamp(min=1e-3).log()


def merge(x: Tensor, size: Tensor | None, leaving: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens x [B, n, D] and sizes [B, n] once a share `leaving` [B, n] of each has been taken in by `target` [B, n].

    A token becomes the mean of what it stands for; those that take nobody in, and those that leave, are as they were.
    """
    size = leaving.new_ones(x.shape[:2]) if size is None else size
    flat, places = x.flatten(0, 1), flat_index(target, x.shape[1])
    moved = leaving * size
    total = size.scatter_add(1, target, moved)
    share = (moved / total.gather(1, target)).to(x.dtype).view(-1, 1)
    return flat.index_add(0, places, share * (flat - flat.index_select(0, places))).view_as(x), total


def in_multiples(wanted: Tensor, lengths: Tensor, prefix: int, multiple: int) -> Tensor:
    """How many tokens [B] stay of images of these lengths [B], prefix included, where so many patches [B] are wanted:
    at least every other patch, and a multiple where that is not too far up (see Runtime.in_multiples)."""
    patches = lengths - prefix
    least, whole = prefix + (patches + 1) // 2, prefix + wanted
    least = torch.where(least >= 3 * multiple, (least + multiple - 1) // multiple * multiple, least)
    rounded = multiple * (whole.double() / multiple).round().long()
    whole = torch.where(whole >= multiple, rounded, whole).clamp(min=0 if prefix else 1)
    return torch.where(wanted >= patches, lengths, torch.maximum(torch.minimum(whole, lengths), least))


def must_leave_pairs(n: int, prefix: int, keep: int) -> None:
    """ValueError where so many of n tokens cannot be kept by merging once."""
    if keep < n - (n - prefix + 1) // 2:
        raise ValueError(f"of {n - prefix} patches every other may go, which does not leave {keep - prefix}")


def flat_index(index: Tensor, tokens: int) -> Tensor:
    """[B * k]: where the tokens at index [B, k] are once batch and tokens [B, tokens] are one dimension."""
    if len(index) == 1:
        return index.flatten()
    return (index + tokens * torch.arange(len(index), device=index.device)[:, None]).flatten()


def flops_of_merging(x: Tensor, *rest: Any, out_val: Any) -> int:
    """FLOPs of a call of `ops.merge_lowest` or one of its kind: scores, and products of pairs."""
    top, chosen = rest[5:7]
    batch, n, width = x.shape
    lengths = chosen.tolist() if isinstance(chosen, Tensor) else [n] * batch
    patches = [length - len(top) for length in lengths]
    return 2 * width * (sum(lengths) + sum(k // 2 * ((k + 1) // 2) for k in patches))


def shapes_of_merged(x: Tensor, keep: int) -> tuple[Tensor, ...]:
    """Empty tensors like what merging returns of x [B, n, D] where `keep` tokens of each image are written."""
    return (
        x.new_empty(len(x), keep, x.shape[-1]),
        *(x.new_empty(len(x), keep, dtype=torch.float32) for _ in range(2)),
        *(x.new_empty(len(x), count, dtype=torch.long) for count in (keep, x.shape[1])),
    )
