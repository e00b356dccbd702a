"""Patches that leave are taken in by the patch most like them, as ToMe merges pairs (arXiv 2210.09461).

Which go is a router's choice, and only patches in every other place may go at a time, each to one of the others: nobody
is taken in by a patch that goes itself. Shapes: B images, n tokens, a prefix in front that neither goes nor takes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from students.execution.tokens import flat_index
from students.kernels import ops
from students.kernels.cpu import toolchain
from students.routers import stream_score

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
def match(x: Tensor, prefix: int, here: Tensor | None = None, every: bool = False) -> Matches:
    """The most similar partners among tokens x [B, n, D]; here [B, n] bool: those that are still there.

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
        best, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
        may_go[:, prefix::2] = True
        target[:, prefix::2] = prefix + 1 + 2 * partner
        distance[:, prefix::2] = _distance(best)
        return Matches(may_go, target, distance)
    cosine = unit @ unit.transpose(1, 2)
    if every:
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


def _native(
    name: str, x: Tensor, given: Sequence[Tensor | None], scalars: Sequence[Tensor | int], length: int, *more: Tensor
) -> tuple[Tensor, ...]:
    """What a C function finds for tokens x [B, n, D]: tokens, sizes, scores and old places of `length` of each image,
    and where each of the n stands then; and `more`, which it fills as well."""
    batch, n, width = x.shape
    out = x.new_empty(batch, length, width)
    sizes, scores = (torch.empty(batch, length) for _ in range(2))
    index, into = (torch.empty(batch, count, dtype=torch.long) for count in (length, n))
    given = [None if t is None else t.contiguous() for t in given]
    found = out, sizes, scores, index, into, *more
    toolchain.call(name, x.contiguous(), *x.shape, *given, NOT_NOW, *scalars, *found)
    return found


def _merge_lowest(
    x: Tensor,
    size: Tensor | None,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    distance_weight: Tensor,
    top: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, n, width), prefix = x.shape, len(top)
    if keep < n - (n - prefix + 1) // 2:
        raise ValueError(f"of {n - prefix} patches every other may go, which does not leave {keep - prefix}")
    if toolchain.native(x) is not None:
        return _native("merge_lowest", x, (size, before, weight, bias, distance_weight, top), (prefix, keep), keep)
    matches = match(x, prefix)
    score = stream_score(x, weight, bias) + distance_weight * matches.distance
    score = score.masked_fill(~matches.may_go, NOT_NOW)
    score[:, :prefix] = top
    score = score if before is None else torch.minimum(score, before)
    order = score.masked_fill(~matches.may_go, NOT_NOW).topk(n, dim=1).indices
    index, gone = order[:, :keep].sort(dim=1).values, order[:, keep:].sort(dim=1).values
    into = torch.arange(n, device=x.device).repeat(batch, 1).scatter(1, gone, matches.target.gather(1, gone))
    x, total = merge(x, size, torch.zeros_like(score).scatter(1, gone, 1.0), matches.target)
    out = x.flatten(0, 1).index_select(0, flat_index(index, n)).view(batch, keep, width)
    return out, total.gather(1, index), score.gather(1, index), index, into


merge_lowest = ops.operator(
    "merge_lowest(Tensor x, Tensor? size, Tensor? before, Tensor weight, Tensor bias, Tensor distance_weight,"
    " Tensor top, int keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, size, before, weight, bias, distance_weight, top, keep: (
        x.new_empty(len(x), keep, x.shape[-1]),
        *(x.new_empty(len(x), keep, dtype=torch.float32) for _ in range(2)),
        *(x.new_empty(len(x), count, dtype=torch.long) for count in (keep, x.shape[1])),
    ),
)(_merge_lowest)
"""Match tokens x [B, n, D], and have those with the lowest scores taken in until `keep` are left, of every image.

size [B, n]: what each stands for (None: 1). before [B, n]: the lowest score it had so far (None: infinity). Scores are
those of `stream_score` with weight [D] and bias [1], plus `distance_weight` [] times the distance; top: those of the
prefix. Returns what is left: tokens [B, keep, D], sizes, scores and old places [B, keep], in order, and where each of
the n tokens stands then [B, n].
"""


def merge_below(
    x: Tensor,
    size: Tensor | None,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    distance_weight: Tensor,
    top: Tensor,
    lengths: Tensor,
    shift: Tensor,
    multiple: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `merge_lowest`, where the tokens with a score below -shift are taken in, as far as `multiple` allows (see
    `Runtime.in_multiples`), and each image has its own length [B] and shift [B]. Only where `toolchain.native`.

    What is left comes first, then what has left; also returned is how many are left [B].
    """
    scalars = len(top), lengths.contiguous(), shift.contiguous(), multiple
    counts = torch.empty(len(x), dtype=torch.long)
    return _native("merge_below", x, (size, before, weight, bias, distance_weight, top), scalars, x.shape[1], counts)


@register_flop_formula(torch.ops.elastic.merge_lowest, get_raw=True)
def _merge_lowest_flops(
    x: Tensor, size: Any, before: Any, weight: Any, bias: Any, distance_weight: Any, top: Tensor, *_, **__
):
    batch, n, width = x.shape
    pairs = (n - len(top)) // 2 * ((n - len(top) + 1) // 2)
    return 2 * batch * (n + pairs) * width
