"""What the rows of a batch are trained for: one budget, or all parts of a range, with a few knots between which
everything is linear."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic.config import BudgetConfig

KNOTS = 6
"""Budgets of a range that have a price and an offset of their own."""
TOP = 0.85
"""No higher budget is trained for, because next to nothing is lost there; the dial reaches it all the same."""


def trained(budget: BudgetConfig) -> tuple[float, ...]:
    """The budgets that have a price: the target, or the knots of a range, ascending."""
    low, high = budget.span
    if not budget.ranges:
        return (low,)
    top = min(high, max(TOP, (low + high) / 2))
    return tuple(low + (top - low) * knot / (KNOTS - 1) for knot in range(KNOTS))


def draw(knots: tuple[float, ...], count: int, seed: int) -> Tensor:
    """Budgets for `count` rows, spread evenly over the range, as parts [count, K] of its knots."""
    if len(knots) == 1:
        return torch.ones(count, 1)
    start = torch.rand((), generator=torch.Generator().manual_seed(seed))
    place = (torch.arange(count) + start) / count * (len(knots) - 1)
    return (1 - (place[:, None] - torch.arange(len(knots))).abs()).clamp(min=0)
