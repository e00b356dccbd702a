"""Merging: patches that leave are merged into the patch most similar to them, as pairs in ToMe (arXiv 2210.09461).

A router chooses which patches leave. At a time, only every other patch may leave, each into one of the remaining ones:
no patch is merged into a patch that leaves itself. Shapes: B images, n tokens; the tokens of a prefix in front neither
leave nor take patches in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NOT_NOW = 1e29
"""The score of a patch that others may merge into, and that has had no lower score in earlier blocks."""


@dataclass
class Matches:
    """The tokens that may leave, and the token that each of them would merge into."""

    may_go: Tensor
    """Whether each token [B, n] may leave; bool."""
    target: Tensor
    """Index [B, n] of the token that each token would merge into; its own index where it may not leave."""
    distance: Tensor
    """Logarithm [B, n] of 1 - cosine similarity of each token and its target; 0 where a token may not leave."""


@torch.no_grad()
def match(
    x: Tensor, prefix: int, here: Tensor | None = None, every: bool = False, lengths: Tensor | None = None
) -> Matches:
    """Match tokens x [B, n, D] with the most similar tokens that they may merge into.

    here [B, n] bool: the tokens that are still there; or lengths [B]: how many tokens at the front of each image are.
    every: each patch may leave, and merge into any other.
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
        odd = here.cumsum(1) % 2 == 0  # odd places among the patches that are here, counted from zero
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
    """Return tokens x [B, n, D] and sizes [B, n] once a share `leaving` [B, n] of each token is merged into its target.

    target [B, n]: indices of tokens. A token becomes the mean of all patches that it stands for; tokens that take no
    others in, and tokens that leave, stay as they are.
    """
    size = leaving.new_ones(x.shape[:2]) if size is None else size
    flat, places = x.flatten(0, 1), flat_index(target, x.shape[1])
    moved = leaving * size
    total = size.scatter_add(1, target, moved)
    share = (moved / total.gather(1, target)).to(x.dtype).view(-1, 1)
    return flat.index_add(0, places, share * (flat - flat.index_select(0, places))).view_as(x), total


def in_multiples(wanted: Tensor, lengths: Tensor, prefix: int, multiple: int) -> Tensor:
    """Return how many tokens [B], prefix included, stay of images with `lengths` [B] tokens if `wanted` [B] patches are
    to stay: at least every other patch, and a multiple where that is not too far up (see Runtime.in_multiples)."""
    patches = lengths - prefix
    least, whole = prefix + (patches + 1) // 2, prefix + wanted
    least = torch.where(least >= 3 * multiple, (least + multiple - 1) // multiple * multiple, least)
    rounded = multiple * (whole.double() / multiple).round().long()
    whole = torch.where(whole >= multiple, rounded, whole).clamp(min=0 if prefix else 1)
    return torch.where(wanted >= patches, lengths, torch.maximum(torch.minimum(whole, lengths), least))


def must_leave_pairs(n: int, prefix: int, keep: int) -> None:
    """Raise ValueError if merging once cannot reduce n tokens to `keep`, because only every other patch may leave."""
    if keep < n - (n - prefix + 1) // 2:
        raise ValueError(f"of {n - prefix} patches every other may go, which does not leave {keep - prefix}")


def flat_index(index: Tensor, tokens: int) -> Tensor:
    """Return the flat indices [B * k] of the tokens at index [B, k] in a tensor [B, tokens, ...] flattened to
    [B * tokens, ...]."""
    if len(index) == 1:
        return index.flatten()
    return (index + tokens * torch.arange(len(index), device=index.device)[:, None]).flatten()


def flops_of_merging(x: Tensor, *rest: Any, out_val: Any) -> int:
    """Return the FLOPs of a call of `ops.merge_lowest`, `ops.merge_normed` or `ops.merge_below`: those of the scores
    and of the similarities of pairs."""
    top, chosen = rest[5:7]
    batch, n, width = x.shape
    lengths = chosen.tolist() if isinstance(chosen, Tensor) else [n] * batch
    patches = [length - len(top) for length in lengths]
    return 2 * width * (sum(lengths) + sum(k // 2 * ((k + 1) // 2) for k in patches))


def shapes_of_merged(x: Tensor, keep: int) -> tuple[Tensor, ...]:
    """Return empty tensors like the results of merging x [B, n, D] where `keep` tokens of each image are written."""
    return (
        x.new_empty(len(x), keep, x.shape[-1]),
        *(x.new_empty(len(x), keep, dtype=torch.float32) for _ in range(2)),
        *(x.new_empty(len(x), count, dtype=torch.long) for count in (keep, x.shape[1])),
    )
