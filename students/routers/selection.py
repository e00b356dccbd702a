"""Hard gates from scores, with surrogate gradients: pure functions on tensors.

Shapes: B batch, T tokens, N gates of one router, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from students.kernels import autograd

Pool = Callable[[Tensor], Tensor]
"""Gathers a tensor [n] from all data-parallel ranks that share a batch, into one [m]."""

Factors = tuple[Tensor, Tensor, int]
"""Factors of an MLP's product activation(gate) * up: (gate, up, activation as numbered in `ops.gated_grad`)."""


def alone(x: Tensor) -> Tensor:
    """Return x: the Pool of a process that does not share its batches."""
    return x


def threshold(score: Tensor) -> Tensor:
    """Return 1 where score >= 0, else 0, with the gradient of sigmoid(score) (straight-through, arXiv 1308.3432)."""
    hard = (score >= 0).to(score.dtype)
    if not torch.is_grad_enabled():
        return hard
    soft = score.sigmoid()
    return hard + (soft - soft.detach())


def topk(score: Tensor, share: float, dim: int) -> Tensor:
    """Return 1 for the round(share * size) largest scores along `dim` (at least one), else 0; gradient as in
    `threshold`."""
    return best(score, how_many(score.shape[dim], share), dim)


def how_many(size: int, share: float) -> int:
    """Return how many of `size` scores `topk` chooses."""
    return min(size, max(1, round(share * size)))


def best(score: Tensor, count: int | Sequence[int], dim: int) -> Tensor:
    """Return 1 for the `count` largest scores along `dim`, else 0; gradient as in `threshold`.

    A sequence has a count for each row of score [B, n] (with dim 1). Scores of -infinity are never chosen.
    """
    if isinstance(count, int):
        hard = torch.zeros_like(score).scatter_(dim, score.topk(count, dim).indices, 1.0)
    else:
        hard = (_rank(score) < torch.tensor(count, device=score.device)[:, None]).to(score.dtype)
    hard = hard * (score > -torch.inf)
    if not torch.is_grad_enabled():
        return hard
    soft = score.sigmoid()
    return hard + (soft - soft.detach())


def _rank(score: Tensor) -> Tensor:
    """Return the rank [B, n] of each score in its row, 0 for the largest."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def even(score: Tensor, shift: float | Tensor, here: Tensor | None = None, pool: Pool = alone) -> Tensor:
    """Return 1 for the k largest scores of each row of score [B, n], else 0, where k, rounded, is the mean over rows of
    the number of scores >= -shift: the same k for all rows. Gradient as of `threshold` of score + shift.

    shift: one number, or [B, 1], one for each row, which then has a k of its own. here [B, n] bool: the scores that may
    be chosen. pool: gathers the scores of the other ranks' rows. The host does not wait for the device.
    """
    if isinstance(shift, Tensor):
        limit = -shift.detach().to(score.dtype)
    else:
        limit = score.new_full((), -shift)
    scores = pool(score.detach().flatten()).sort().values
    below = torch.searchsorted(scores, limit)
    count = ((len(scores) - below) / (len(scores) // score.shape[1])).round()
    ranked = score if here is None else score.masked_fill(~here, -torch.inf)
    soft = (score + shift).sigmoid()
    return (_rank(ranked) < count).to(score.dtype) + (soft - soft.detach())


def score_weight(score: Tensor, over_gates: bool) -> Tensor:
    """Return the factor of an open gate's output as in ElastiFormer (arXiv 2411.15281), scaled to be 1 for zero scores.

    over_gates: n*softmax over the n gates of the last dimension; otherwise 2*sigmoid of each score.
    """
    return score.shape[-1] * score.softmax(-1) if over_gates else 2 * score.sigmoid()


def channel(x: Tensor, log_limit: Tensor, factors: Factors | None = None) -> tuple[Tensor, Tensor]:
    """Return x [..., C] with the channels below the limit, |x| < exp(log_limit), set to 0, and the share [...] of the
    others, float32.

    log_limit [C], or [B, 1, C] if each row of x [B, T, C] has limits of its own. factors: the factors of x, if it is an
    MLP's product that was computed without recording gradients; gradients then go to the factors.

    Selecting channels by a calibrated magnitude is TEAL's method (arXiv 2408.14690); weighting the magnitudes by the
    weight's columns, as the limits' start does, WINA's (arXiv 2505.19427).
    """
    out: tuple[Tensor, Tensor]
    if factors is None:
        out = autograd.ChannelGate.apply(x, log_limit)
    else:
        out = autograd.GatedChannelGate.apply(x, log_limit, *factors)
    return out


def prompt_mean(x: Tensor, prompt: Tensor) -> Tensor:
    """Return the mean [B, 1, D] of x [B, T, D] over the prompt's tokens alone; prompt [B, T] bool: which these are."""
    weight = prompt.to(x.dtype).unsqueeze(-1)
    return (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


def hide_closed_keys(mask: Tensor | None, kept: Tensor, dtype: torch.dtype, causal: bool = True) -> Tensor:
    """Return the attention mask [B, 1, T, T] that hides the keys of all tokens outside of kept [B, T] bool, except from
    the token itself.

    mask: the model's mask: None, boolean (True: visible) or additive. causal: whether None stands for causal attention.
    """
    tokens = kept.shape[1]
    allowed = kept[:, None, None, :] | torch.eye(tokens, dtype=torch.bool, device=kept.device)
    if mask is None and not causal:
        return additive(allowed, dtype)
    if mask is None:
        return allowed & torch.ones(tokens, tokens, dtype=torch.bool, device=kept.device).tril()
    if mask.dtype == torch.bool:
        return allowed & mask
    return mask.masked_fill(~allowed, unseen(dtype))


def unseen(dtype: torch.dtype) -> float:
    """Return what an additive mask of this dtype holds for a hidden key.

    Not the lowest number of all: attention kernels on GPUs multiply scores by log2(e), to which the lowest bfloat16 or
    float32 overflows, so that a query becomes NaN if all keys of the first tile are hidden (pytorch issue 109517).
    """
    return max(torch.finfo(dtype).min, -(2.0**40))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an attention mask that is added to the scores, of this dtype if `mask` is boolean (True: visible)."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, unseen(dtype))
