"""Routers that score gates from what their branch reads."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.kernels.scoring import per_size, stream_score
from students.prepared import InPrecision, Stamp
from students.spec import RouterSpec

LEVELS = 65
"""Quantiles that are kept of the scores of a router with quota."""


class Added(nn.Module):
    """A part that is added to a model: its parameters stay float32 where the model is converted to another type."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def convert(x: Tensor) -> Tensor:
            out = fn(x)
            return out if out.dtype == x.dtype else x.to(out.device)

        return super()._apply(convert, recurse)  # type: ignore[no-untyped-call]


class ThinLinear(nn.Linear):
    """A linear layer in its input's precision: on many tokens a copy of them in float32 costs more than the router."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self._precise = InPrecision()

    def forward(self, x: Tensor) -> Tensor:
        if self.out_features > 1:
            return F.linear(x, *self._parameters_in(x.dtype))
        product, *bias = self.parts(x)
        return product + bias[0] if bias else product

    def parts(self, x: Tensor) -> list[Tensor]:
        """The product [..., 1] of a layer with one output, and the bias [1] where it has one."""
        weight, *bias = self._parameters_in(x.dtype)
        return [(x @ weight[0]).unsqueeze(-1), *bias]  # faster than a product with a thin matrix

    def _parameters_in(self, dtype: torch.dtype) -> list[Tensor]:
        return self._precise(dtype, self.weight, *([] if self.bias is None else [self.bias]))


class Router(Added):
    """Scores for n gates from a branch's input: zero at the start, and a gate is open where its score is >= 0.

    members: which gate each channel in front of the branch's last linear layer belongs to (head and expert routers).
    """

    members: Tensor | None
    levels: Tensor | None

    def __init__(
        self, spec: RouterSpec, width: int, gates: int, members: Tensor | None = None, gains: bool = False
    ) -> None:
        super().__init__()
        self.spec = spec
        self.gates = gates
        self.register_buffer("members", members)
        self.register_buffer("levels", torch.zeros(LEVELS) if spec.selection == "quota" else None)
        self._quota, self._stamp = 0.0, Stamp()
        self._stands, self._stood = True, Stamp()
        self.log_gain = nn.Parameter(torch.zeros(())) if gains else None
        self.distance_weight = nn.Parameter(torch.zeros(())) if spec.dropped == "merge" else None
        if spec.network == "static":
            self.score = nn.Parameter(torch.zeros(gates))
            return
        self.linear = ThinLinear(width, gates)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if spec.network == "mlp":
            last = ThinLinear(spec.hidden, gates, bias=False)
            self.mlp = nn.Sequential(ThinLinear(width, spec.hidden), nn.GELU(), last)
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> scores [B, T, N] (static: [1, 1, N]), float32."""
        if self.spec.network == "static":
            return self.score.clone()[None, None]  # a view would claim a gradient where none is recorded
        score: Tensor = self.linear(x)
        if self.spec.network == "mlp":
            score = score + self.mlp(x)
        return score.float()

    def of_stream(self, x: Tensor, distance: Tensor | None = None) -> Tensor:
        """Scores [B, T] of tokens x [B, T, D] of the residual stream, each divided by its root mean square.

        distance [B, T]: of each token to the one that would take it in, where tokens merge.
        """
        if self.spec.network == "mlp":
            score: Tensor = self(x * per_size(x).unsqueeze(-1).to(x.dtype)).squeeze(-1)
        else:
            score = stream_score(x, self.linear.weight[0], self.linear.bias)
        return score if distance is None or self.distance_weight is None else score + self.distance_weight * distance

    @property
    def of_channel(self) -> Tensor:
        """`members` of a head or expert router."""
        assert self.members is not None, "its gates are among no channels"
        return self.members

    def share(self, gate: Tensor) -> Tensor:
        """What gates [..., N] leave open of the channels that they switch [...]; groups may differ in size by one."""
        if self.members is None or len(self.members) % self.gates == 0:
            return gate.mean(-1)
        sizes: Tensor = self.members.bincount(minlength=self.gates) / len(self.members)
        return gate @ sizes

    def shift(self, dial: float | Tensor) -> float | Tensor:
        """What the dial adds to the scores."""
        return dial if self.log_gain is None else self.log_gain.exp() * dial

    @torch.no_grad()
    def open_by(self, offset: float) -> None:
        """Raise all scores as far as the dial would at this offset; for routers with a linear map."""
        rise = self.shift(offset)
        for raised in (self.linear.bias, self.levels):
            if raised is not None:
                raised.add_(rise)

    def stands(self, raised: Tensor, offset: float) -> bool:
        """Whether the one gate of a static router is open, given its score as the dial raises it at this offset; the
        device is asked once for each setting."""
        if self._stood.renew([x for x in (self.score, self.log_gain) if x is not None], offset):
            self._stands = bool((raised >= 0).all())
        return self._stands

    def set_quota(self, scores: Tensor) -> None:
        """Take the distribution of scores [N] as the one that `quota` answers for."""
        assert self.levels is not None, "only a router with quota has levels"
        steps = torch.linspace(0, 1, LEVELS, device=scores.device)
        self.levels.copy_(torch.quantile(scores.float().flatten(), steps))

    def quota(self, offset: float) -> float:
        """The share of scores that are at least as large as the dial asks, between 0 and 1."""
        assert self.levels is not None, "only a router with quota has levels"
        if self._stamp.renew([x for x in (self.levels, self.log_gain) if x is not None], offset):
            with torch.no_grad():
                self._quota = self._quota_at(float(self.shift(offset)), self.levels.tolist())
        return self._quota

    @staticmethod
    def _quota_at(offset: float, levels: list[float]) -> float:
        place = bisect.bisect_left(levels, -offset)
        if place == 0 or place == len(levels):
            return 0.0 if place else 1.0
        low, high = levels[place - 1], levels[place]
        return 1 - (place - 1 + (-offset - low) / (high - low)) / (len(levels) - 1)

    def macs(self, width: int) -> int:
        """Multiply-accumulates for one token."""
        if self.spec.network == "static":
            return 0
        mlp = self.spec.hidden * (width + self.gates) if self.spec.network == "mlp" else 0
        return width * self.gates + mlp
