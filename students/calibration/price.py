"""One price for all gates: what closing each would cost, what it saves, and where a budget is reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from students.calibration.fit import ridge
from students.routers import Router

LOWEST, HIGHEST, FINENESS = -30.0, 15.0, 0.002
"""Logarithms of prices that are told apart."""


@dataclass(frozen=True)
class Start:
    """Result of a calibration."""

    price: float
    """Nats per unit of compute at which gates close."""
    compute: float
    """Predicted compute ratio."""
    prices: tuple[float, ...]
    """The price of each budget that was asked for."""

    @property
    def offsets(self) -> tuple[float, ...]:
        """How far to turn the dial from this start for each of them: a channel's cost is its magnitude squared."""
        return tuple((math.log(self.price) - math.log(price)) / 2 for price in self.prices)


@dataclass(frozen=True)
class Choice:
    """One router before the price is known: cost [rows, gates] in nats, saving of a gate, how to set the start."""

    cost: Tensor
    saving: float
    apply: Callable[[float], None]


def start_at(choices: list[Choice], curve: Curve, compute: Sequence[float], targets: Sequence[float]) -> Start:
    """Start all routers at the price that reaches the target, or half-way between those of several.

    compute: for each target, what the student would spend if none of these gates closed.
    """
    prices = [curve.price(whole, target) for whole, target in zip(compute, targets, strict=True)]
    price = math.sqrt(prices[0] * prices[-1])
    for choice in choices:
        choice.apply(price)
    middle = (compute[0] + compute[-1]) / 2
    return Start(price, middle - curve.saved(price), tuple(prices))


def log_likelihood(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sum over rows of log p(y) for logits [N, V], y drawn from the distribution that they are."""
    logits = logits.float()
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
    return -F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")


def gate_costs(likelihood: Callable[[], Tensor], gates: Sequence[Tensor], draws: int) -> list[Tensor]:
    """The Fisher estimate of what closing each gate costs in nats, E[g^2] / 2 with g the gradient of log p(y) by the
    gate; likelihood: log p(y), with y drawn anew at each of so many calls."""
    drawn = [torch.autograd.grad(likelihood(), gates, retain_graph=True) for _ in range(draws)]
    return [torch.stack(grads).float().square().mean(0) / 2 for grads in zip(*drawn, strict=True)]


class Curve:
    """What the gates of some choices save, and what is lost with them, as functions of the price they close at."""

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
        """Compute that is saved at this price, as a share of the model's."""
        return float(self._saved[self._place(price)])

    def lost(self, price: float) -> float:
        """Estimated KL of everything that closes at this price, in nats per token."""
        return float(self._lost[self._place(price)])

    def price(self, compute: float, target: float) -> float:
        """The lowest price at which `compute` comes down to `target`."""
        place = int(torch.searchsorted(self._saved, compute - target)) + 1
        return math.exp(LOWEST + FINENESS * min(place, self.points))


def gated_choice(router: Router, x: Tensor, cost: Tensor, saving: float) -> Choice:
    """A router that predicts log(cost): by ridge regression, or as the mean where it has no input.

    The last column of x is the distance to the token that would take each in, where tokens merge.
    """
    logs = cost.clamp(min=1e-12).log()
    static = router.spec.network == "static"
    if static:
        logs = cost.mean(0, keepdim=True).clamp(min=1e-12).log()
    weight = logs if static else ridge(x, logs)
    predicted = logs if static else x @ weight[:-1] + weight[-1]

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
            router.log_gain.fill_(math.log(2))  # scores are logarithms of costs, limits of their square roots

    return Choice(predicted.exp(), saving, apply)
