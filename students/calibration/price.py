"""One price for all gates: each gate's cost and saving, and the price at which a budget is reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from students.calibration.fit import ridge
from students.routers import OPEN, ChannelRouter, Router

LOWEST, HIGHEST, FINENESS = -30.0, 15.0, 0.002
"""Range and spacing of the grid of log prices."""
PRICED_ROWS = 256
"""Tokens on which the limits of channels are priced."""


@dataclass(frozen=True)
class Start:
    """Result of a calibration."""

    price: float
    """Nats per unit of compute at which gates close."""
    compute: float
    """Predicted compute ratio at this price."""
    prices: tuple[float, ...]
    """The price that reaches each of the requested budgets."""

    @property
    def offsets(self) -> tuple[float, ...]:
        """Offset of the dial that reaches each budget from this start: half the difference of log prices, because the
        dial shifts logarithms of channels' magnitudes, and a channel's cost is its squared magnitude."""
        return tuple((math.log(self.price) - math.log(price)) / 2 for price in self.prices)


@dataclass(frozen=True)
class Choice:
    """One router before the price is known: cost [rows, gates] in nats, saving of one gate as a share of the model's
    compute, and a function that initialises the router at a price."""

    cost: Tensor
    saving: float
    apply: Callable[[float], None]


def start_at(choices: list[Choice], curve: Curve, compute: Sequence[float], targets: Sequence[float]) -> Start:
    """Initialise all routers at the price that reaches the target, or at the geometric mean of the prices of the first
    and the last target.

    compute: for each target, the student's compute ratio if none of these gates closed.
    """
    prices = [curve.price(whole, target) for whole, target in zip(compute, targets, strict=True)]
    price = math.sqrt(prices[0] * prices[-1])
    for choice in choices:
        choice.apply(price)
    middle = (compute[0] + compute[-1]) / 2
    return Start(price, middle - curve.saved(price), tuple(prices))


def log_likelihood(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the sum over rows of log p(y) for logits [N, V], with y drawn from the softmax of the logits."""
    logits = logits.float()
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
    return -F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")


def gate_costs(likelihood: Callable[[], Tensor], gates: Sequence[Tensor], draws: int) -> list[Tensor]:
    """Return the Fisher estimate in nats of the cost of closing each gate: E[g^2] / 2, with g the gradient of log p(y)
    with respect to the gate; likelihood: returns log p(y) for a newly drawn y, and is called `draws` times."""
    drawn = [torch.autograd.grad(likelihood(), gates, retain_graph=True) for _ in range(draws)]
    return [torch.stack(grads).float().square().mean(0) / 2 for grads in zip(*drawn, strict=True)]


class Curve:
    """Total saving and total loss of the gates of some choices, as functions of the price at which they close."""

    @torch.no_grad()
    def __init__(self, choices: list[Choice]) -> None:
        self.points = int((HIGHEST - LOWEST) / FINENESS)
        saving = torch.zeros(self.points, dtype=torch.float64)
        for choice in choices:
            place = ((choice.cost.flatten() / choice.saving).clamp(min=1e-30).log() - LOWEST) / FINENESS
            count = place.long().clamp(0, self.points - 1).bincount(minlength=self.points).cpu()
            saving += count * choice.saving / len(choice.cost)
        prices = (LOWEST + FINENESS * (torch.arange(self.points, dtype=torch.float64) + 0.5)).exp()
        self._saved, self._lost = saving.cumsum(0), (prices * saving).cumsum(0)

    def _place(self, price: float) -> int:
        return min(self.points, max(1, round((math.log(price) - LOWEST) / FINENESS))) - 1

    def saved(self, price: float) -> float:
        """Return the compute saved at this price, as a share of the model's."""
        return float(self._saved[self._place(price)])

    def lost(self, price: float) -> float:
        """Return the estimated KL of all gates that close at this price, in nats per token."""
        return float(self._lost[self._place(price)])

    def price(self, compute: float, target: float) -> float:
        """Return the lowest price at which the saving reduces the ratio `compute` to `target`."""
        place = int(torch.searchsorted(self._saved, compute - target)) + 1
        return math.exp(LOWEST + FINENESS * min(place, self.points))


def gated_choice(router: Router, x: Tensor, cost: Tensor, saving: float, *, keeps_mean: bool = False) -> Choice:
    """Return the choice of a router that predicts log(cost), by ridge regression on the features x [rows, D], or as the
    mean cost if the router is static.

    keeps_mean: whether predictions are raised until their mean is that of the costs: a regression of logarithms
    predicts a geometric mean, which misses the few tokens that need a branch most. Where tokens merge, the last column
    of x is a token's distance to the token that it would merge into.
    """
    logs = cost.clamp(min=1e-12).log()
    static = router.spec.network == "static"
    if static:
        logs = cost.mean(0, keepdim=True).clamp(min=1e-12).log()
    weight = logs if static else ridge(x, logs)
    predicted = logs if static else x @ weight[:-1] + weight[-1]
    if keeps_mean and not static:
        short = (cost.clamp(min=1e-12).mean(0) / predicted.exp().mean(0)).log()
        weight[-1] += short
        predicted = predicted + short

    @torch.no_grad()
    def apply(price: float) -> None:
        threshold = torch.tensor(price * saving).log()
        if static:
            router.score.copy_(weight[0] - threshold)
        else:
            maps = weight[:-1]
            if router.distance_weight is not None:
                router.distance_weight.copy_(maps[-1, 0])
                maps = maps[:-1]
            router.linear.weight.copy_(maps.T)
            router.linear.bias.copy_(weight[-1] - threshold)
        if router.log_gain is not None:
            router.log_gain.fill_(math.log(2))  # scores are logarithms of costs, channels' limits of their square roots

    return Choice(predicted.exp(), saving, apply)


def limit_choice(router: ChannelRouter, x: Tensor, importance: Tensor, saving: float) -> Choice:
    """Return the choice of a router of channels with values x [rows, C], where closing one costs importance * x^2 / 2
    nats, importance [C]: limits solve cost < price * saving for x, or of the mean cost if the router is static."""
    cost, static = x[:PRICED_ROWS].pow(2) * importance / 2, router.spec.network == "static"
    cost = cost.mean(0, keepdim=True) if static else cost
    return Choice(cost, saving, limits_for(router, cost[0] if static else importance / 2, saving))


def limits_for(router: ChannelRouter, each: Tensor, saving: float) -> Callable[[float], None]:
    """Return a function of the price that sets limits below which each * x^2 < price * saving; each: [C]."""

    @torch.no_grad()
    def apply(price: float) -> None:
        limit = price * saving / each.clamp(min=1e-30)
        router.log_limit.copy_((limit.log() / 2).clamp(OPEN, -OPEN))

    return apply
