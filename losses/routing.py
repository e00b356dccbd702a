"""Losses on the routers' decisions: how much they open, how evenly, and how predictably.

Shapes: B sequences, T tokens, M experts (or heads). Gates are 0 or 1 in value and carry a straight-through gradient, or
are soft; masks are bool and mark the tokens that count.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def budget_price(multiplier: Tensor, compute: Tensor, target: float, stiffness: float) -> tuple[Tensor, Tensor]:
    """Return the price of a unit of compute in the next step's loss, and the multiplier for the step after it.

    This is the augmented Lagrangian of "compute = target", whose gradient is (multiplier + stiffness * miss) times that
    of the expected compute. With that factor as a constant price, the penalty stays a sum over rows and chunks. The
    multiplier integrates the miss (compute - target), so that the budget is met however strongly the loss pulls the
    other way. Price and multiplier are never negative.
    """
    miss = compute - target
    return F.relu(multiplier + stiffness * miss), F.relu(multiplier + stiffness * miss / 20)


def budget_prices(prices: Tensor, misses: Tensor, stiffness: float) -> Tensor:
    """Return the price [K] of a unit of compute in the next step at each of K budgets, from prices [K] and misses [K].

    Prices of a range of budgets differ by orders of magnitude, so each is multiplied by a factor that depends on its
    miss (compute - budget). Prices adapt slowly; the dial corrects the miss that remains.
    """
    return prices * (misses * (stiffness / 20)).exp()


def capacity_hinge(open_share: Tensor, capacity: float) -> Tensor:
    """Return the mean over sites of max(0, open share - capacity) (Router-Tuning, arXiv 2410.13184)."""
    return F.relu(open_share - capacity).mean()


def load_balance(gates: Tensor) -> Tensor:
    """Return M * sum_i f_i P_i of gates [..., M]: 1 if all experts are used equally, M if one takes everything.

    f_i is expert i's share of all open gates, a constant, and P_i the same share with a gradient, where Switch
    Transformers (arXiv 2101.03961) have routing probabilities. The value is 1 plus the squared coefficient of variation
    of the experts' use.
    """
    totals = gates.flatten(0, -2).float().sum(0)
    shares = totals / totals.sum().clamp(min=torch.finfo(totals.dtype).tiny)
    return gates.shape[-1] * (shares.detach() * shares).sum()


def topk_bce(scores: Tensor, share: float, mask: Tensor | None = None) -> Tensor:
    """Return the loss that trains scores [B, T] (before the sigmoid) to predict the top-k choice in their sequence.

    k is `share` of each sequence's counted tokens, rounded up. The top-k choice is a constant target, and the loss is
    the mean binary cross-entropy over counted tokens. After training, a threshold of 0.5 chooses much like the top-k,
    without looking at other tokens (Mixture-of-Depths, arXiv 2404.02258; ElastiFormer, arXiv 2411.15281).
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    scores = scores.float()
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    order = scores.detach().masked_fill(~mask, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    k = (mask.sum(1, keepdim=True) * share).ceil()
    chosen = (rank < k).to(scores.dtype)
    losses = F.binary_cross_entropy_with_logits(scores, chosen, reduction="none")
    return losses.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)
