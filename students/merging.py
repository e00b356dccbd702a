"""Patches that leave are taken in by the patch most like them, as ToMe merges pairs (arXiv 2210.09461).

Which go is a router's choice, and only patches in every other place may go at a time, each to one of the others: nobody
is taken in by a patch that goes itself. Shapes: B images, n tokens, a prefix in front that neither goes nor takes in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from students.wrappers import flat_index


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
    alike = unit @ unit.transpose(1, 2)
    if every:
        goes = takes = torch.ones(alike.shape[:2], dtype=torch.bool, device=x.device)
        alike.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    else:
        here = here[:, prefix:]
        odd = here.cumsum(1) % 2 == 0  # places among those that are here, counted from zero
        goes, takes = here & ~odd, here & odd
    best, partner = alike.masked_fill(~takes[:, None, :], -torch.inf).max(-1)
    goes = goes & takes.any(1, keepdim=True)
    may_go[:, prefix:] = goes
    target[:, prefix:] = torch.where(goes, prefix + partner, target[:, prefix:])
    distance[:, prefix:] = torch.where(goes, _distance(best), 0.0)
    return Matches(may_go, target, distance)


def _distance(cosine: Tensor) -> Tensor:
    return (1 - cosine).clamp(min=1e-3).log()


def merge(
    x: Tensor, size: Tensor | None, leaving: Tensor, target: Tensor, source: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens x [B, n, D] and sizes [B, n] once a share `leaving` [B, m] of tokens has been taken in by `target` [B, m].

    source [B, m]: where those that leave are; None: everywhere. A token becomes the mean of what it stands for; those
    that take nobody in, and those that leave, are as they were.
    """
    size = leaving.new_ones(x.shape[:2]) if size is None else size
    flat, places = x.flatten(0, 1), flat_index(target, x.shape[1])
    moved = leaving * (size if source is None else size.gather(1, source))
    total = size.scatter_add(1, target, moved)
    share = (moved / total.gather(1, target)).to(x.dtype).view(-1, 1)
    leavers = flat if source is None else flat.index_select(0, flat_index(source, x.shape[1]))
    return flat.index_add(0, places, share * (leavers - flat.index_select(0, places))).view_as(x), total
