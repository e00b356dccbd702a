"""Channels of a linear layer's input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from students.spec import RouterSpec

OPEN = -30.0
"""log_limit of an open channel: exp(-30) is below every non-zero activation."""


class ChannelRouter(nn.Module):
    """One learned limit per input channel: the channel is read where |x| reaches it (see selection.channel).

    static: the choice is fixed, by a learned score per channel.
    """

    def __init__(self, spec: RouterSpec, width: int, gains: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.log_limit = nn.Parameter(torch.full((width,), OPEN))
        self.log_gain = nn.Parameter(torch.zeros(width)) if gains else None

    def turned(self, turn: float | Tensor) -> Tensor:
        """The logarithm of the limit where the dial is at `turn`: [C], or [..., C] for turns [..., 1]."""
        return self.log_limit - (turn if self.log_gain is None else self.log_gain.exp() * turn)

    def limit(self, turn: float | Tensor, dtype: torch.dtype) -> Tensor:
        """What |x| has to reach [C] or [..., C], float32 but rounded to x's dtype; static: 0 where open, infinity where
        closed."""
        turned = self.turned(turn).detach()
        if self.spec.network == "static":
            return torch.where(turned <= 0, 0.0, torch.inf)
        return turned.exp().to(dtype).float()
