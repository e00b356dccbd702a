"""Routers of channels in the input of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from students.routers import selection
from students.routers.base import Added
from students.spec import RouterSpec

OPEN = -30.0
"""log_limit of an open channel: exp(-30) is below every non-zero activation."""


class ChannelRouter(Added):
    """One learned limit for each input channel: a channel is read where |x| >= limit (see selection.channel).

    `network: static`: the same channels are read for every input, those with log_limit <= 0 at the present offset.
    """

    def __init__(self, spec: RouterSpec, width: int, gains: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.log_limit = nn.Parameter(torch.full((width,), OPEN))
        self.log_gain = nn.Parameter(torch.zeros(width)) if gains else None

    def log_limit_at(self, dial: float | Tensor) -> Tensor:
        """Return the logarithm of the limits at this offset: [C], or [..., C] for offsets [..., 1]."""
        return self.log_limit - (dial if self.log_gain is None else self.log_gain.exp() * dial)

    def limit(self, dial: float | Tensor, dtype: torch.dtype) -> Tensor:
        """Return the limits [C] or [..., C] of |x|, in float32 but rounded to x's dtype; static: 0 for open channels,
        infinity for closed ones."""
        log_limit = self.log_limit_at(dial).detach()
        if self.spec.network == "static":
            return torch.where(log_limit <= 0, 0.0, torch.inf)
        return log_limit.exp().to(dtype).float()

    def read(self, x: Tensor, dial: float | Tensor, factors: selection.Factors | None = None) -> tuple[Tensor, Tensor]:
        """Return x [..., C] with closed channels set to 0, and the share [...] of open channels.

        dial: offset for x; factors: as in `selection.channel`.
        """
        log_limit = self.log_limit_at(dial)
        if self.spec.network == "static":
            gate = selection.threshold(-log_limit)
            return x * gate.to(x.dtype), gate.mean(-1).expand(x.shape[:-1])
        return selection.channel(x, log_limit, factors)
