"""Budgets that the rows of a batch are trained for: one target, or a range, represented by a few knots between which
prices and offsets are interpolated linearly."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic.config import BudgetConfig

KNOTS = 6
"""Number of budgets of a range that have a price and an offset of their own."""
TOP = 0.85
"""Highest budget of a range that is trained for (or the range's middle, if that is higher). Above it next to no quality
is lost, and the dial reaches these budgets without training."""


def trained_budgets(budget: BudgetConfig) -> tuple[float, ...]:
    """Return the budgets that have a price: the target, or the knots of a range, ascending."""
    low, high = budget.span
    if not budget.ranges:
        return (low,)
    top = min(high, max(TOP, (low + high) / 2))
    return tuple(low + (top - low) * knot / (KNOTS - 1) for knot in range(KNOTS))


def draw(knots: tuple[float, ...], count: int, seed: int) -> Tensor:
    """Return budgets for `count` rows, spread evenly over the range from a random start, as interpolation weights
    [count, K] of its knots."""
    if len(knots) == 1:
        return torch.ones(count, 1)
    start = torch.rand((), generator=torch.Generator().manual_seed(seed))
    place = (torch.arange(count) + start) / count * (len(knots) - 1)
    return (1 - (place[:, None] - torch.arange(len(knots))).abs()).clamp(min=0)
