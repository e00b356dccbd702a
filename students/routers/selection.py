"""Hard gates and their gradients: pure functions on tensors.

Shapes: B batch, T tokens, N gates of one router, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from students.kernels import autograd

Pool = Callable[[Tensor], Tensor]
"""From what this process has of something [n] to what all that share a batch have of it [m]."""

Factors = tuple[Tensor, Tensor, int]
"""Of an MLP's product activation(gate) * up: (gate, up, which activation it is, as in `ops.gated_grad`)."""


def alone(x: Tensor) -> Tensor:
    """The pool of a process that shares its batches with no other."""
    return x


def threshold(score: Tensor) -> Tensor:
    """1 where the score is >= 0, else 0; the gradient is that of sigmoid(score) (straight-through, arXiv 1308.3432)."""
    hard = (score >= 0).to(score.dtype)
    if not torch.is_grad_enabled():
        return hard
    soft = score.sigmoid()
    return hard + (soft - soft.detach())


def topk(score: Tensor, share: float, dim: int) -> Tensor:
    """1 for the round(share * size) largest scores along `dim` (at least one), else 0; gradient as in `threshold`."""
    return best(score, how_many(score.shape[dim], share), dim)


def how_many(size: int, share: float) -> int:
    """How many of so many `topk` chooses."""
    return min(size, max(1, round(share * size)))


def best(score: Tensor, count: int | Sequence[int], dim: int) -> Tensor:
    """1 for the `count` largest scores along `dim`, else 0; gradient as in `threshold`.

    count may differ between the rows of score [B, n] (dim 1). Scores of -infinity are never among the largest.
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
    """The place [B, n] of each score in its row, the largest first."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def even(score: Tensor, shift: float | Tensor, here: Tensor | None = None, pool: Pool = alone) -> Tensor:
    """1 for the k largest scores [B, n] of each row, k being how many are >= -shift in the mean over rows, else 0.

    shift: one number, or [B, 1], one for each row. Gradient as in `threshold` of score + shift; here [B, n] bool: which
    may be chosen; pool: finds what other processes have of the batch. Nothing waits for the device.
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
    """What ElastiFormer (arXiv 2411.15281) multiplies an open gate's output by, scaled to 1 at equal or zero scores.

    over_gates: n*softmax over the last dimension; else 2*sigmoid, gate by gate.
    """
    return score.shape[-1] * score.softmax(-1) if over_gates else 2 * score.sigmoid()


def channel(x: Tensor, log_limit: Tensor, factors: Factors | None = None) -> tuple[Tensor, Tensor]:
    """Keep the channels of x [..., C] whose magnitude reaches exp(log_limit); also the share kept [...], float32.

    log_limit [C], or [B, 1, C] where it differs from row to row of x [B, T, C]. factors: of which x is the product,
    made without a gradient, which goes to them.

    Channel selection by calibrated magnitude is TEAL (arXiv 2408.14690); weighing by the columns WINA (2505.19427).
    """
    out: tuple[Tensor, Tensor]
    if factors is None:
        out = autograd.ChannelGate.apply(x, log_limit)
    else:
        out = autograd.GatedChannelGate.apply(x, log_limit, *factors)
    return out


def rows(exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """exact [..., V] where preview >= limit [..., 1], else preview + tail []; also the share of exact rows [...]."""
    out: tuple[Tensor, Tensor] = autograd.RowGate.apply(exact, preview, limit, tail)
    return out


def prompt_mean(x: Tensor, prompt: Tensor) -> Tensor:
    """Mean over the prompt's tokens: x [B, T, D], prompt [B, T] bool -> [B, 1, D]. Nothing after the prompt enters."""
    weight = prompt.to(x.dtype).unsqueeze(-1)
    return (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


def hide_closed_keys(mask: Tensor | None, kept: Tensor, dtype: torch.dtype, causal: bool = True) -> Tensor:
    """The attention mask [B, 1, T, T] under which only tokens with kept [B, T] are attended to, and each token itself.

    mask: what the model would use: None, boolean (True attends) or additive. causal: what None means.
    """
    tokens = kept.shape[1]
    allowed = kept[:, None, None, :] | torch.eye(tokens, dtype=torch.bool, device=kept.device)
    if mask is None and not causal:
        return torch.zeros(allowed.shape, dtype=dtype, device=kept.device).masked_fill(~allowed, torch.finfo(dtype).min)
    if mask is None:
        return allowed & torch.ones(tokens, tokens, dtype=torch.bool, device=kept.device).tril()
    if mask.dtype == torch.bool:
        return allowed & mask
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)
