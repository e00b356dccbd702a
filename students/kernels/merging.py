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
    to stay: at least every other patch, and a multiple where that is not too far up (see PatchCounts.near)."""
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


def merge_lowest(x: Tensor, size: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *router, keep = rest
    n, prefix = x.shape[1], len(router[-1])
    must_leave_pairs(n, prefix, keep)
    matches = match(x, prefix)
    score = _scores(x, matches, *router)
    order = score.masked_fill(~matches.may_go, NOT_NOW).topk(n, dim=1).indices
    index, gone = order[:, :keep].sort(dim=1).values, order[:, keep:].sort(dim=1).values
    into = torch.arange(n, device=x.device).repeat(len(x), 1).scatter(1, gone, matches.target.gather(1, gone))
    x, total = merge(x, size, torch.zeros_like(score).scatter(1, gone, 1.0), matches.target)
    return at(x, index), total.gather(1, index), score.gather(1, index), index, into


def merge_normed(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *given, gain, offset, epsilon = rest
    merged = torch.ops.elastic.merge_lowest(x, *given)
    return F.layer_norm(merged[0], gain.shape, gain, offset, epsilon), *merged


def merge_below(x: Tensor, size: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *router, lengths, shift, multiple = rest
    n, prefix = x.shape[1], len(router[-1])
    own = torch.arange(n, device=x.device).repeat(len(x), 1)
    here = own < lengths[:, None]
    matches = match(x, prefix, lengths=lengths)
    score = _scores(x, matches, *router)
    fine = (score + shift[:, None] >= 0) | ~matches.may_go
    wanted = (fine & here)[:, prefix:].sum(1)
    leaving = lengths - in_multiples(wanted, lengths, prefix, multiple)
    order = score.masked_fill(~matches.may_go, torch.inf).argsort(dim=1, stable=True)
    gone = (order.argsort(dim=1) < leaving[:, None]) & matches.may_go
    merged, total = merge(x, size, gone.float(), matches.target)
    stays = here & ~gone
    counts = stays.sum(1)
    index = stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    left = own < counts[:, None]
    sizes = torch.where(left, total.gather(1, index), 1.0)
    scores = torch.where(left, score.gather(1, index), -torch.inf)
    return at(merged, index), sizes, scores, index, torch.where(gone, matches.target, own), counts


def _scores(
    x: Tensor,
    matches: Matches,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    distance_weight: Tensor,
    top: Tensor,
) -> Tensor:
    """Return scores [B, n], by which tokens leave: the lowest so far; NOT_NOW for patches that may not leave now."""
    score = stream_score(x, weight, bias) + distance_weight * matches.distance
    score = score.masked_fill(~matches.may_go, NOT_NOW)
    score[:, : len(top)] = top
    return score if before is None else torch.minimum(score, before)


def at(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens of x [B, n, D] at index [B, k]."""
    return x.flatten(0, 1).index_select(0, flat_index(index, x.shape[1])).view(*index.shape, -1)


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
