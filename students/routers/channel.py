"""Channels of a linear layer's input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from students.architectures.record import LINEAR_SITES
from students.routers import selection
from students.routers.registry import Kind

if TYPE_CHECKING:
    from students.calibration.observe import BlockStart, Watched
    from students.calibration.price import Choice
    from students.compute import BlockCost
    from students.places import BlockPlace
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

    def log_limit_at(self, dial: float | Tensor) -> Tensor:
        """The logarithm of the limit at this offset of the dial: [C], or [..., C] for offsets [..., 1]."""
        return self.log_limit - (dial if self.log_gain is None else self.log_gain.exp() * dial)

    def limit(self, dial: float | Tensor, dtype: torch.dtype) -> Tensor:
        """What |x| has to reach [C] or [..., C], float32 but rounded to x's dtype; static: 0 where open, infinity where
        closed."""
        log_limit = self.log_limit_at(dial).detach()
        if self.spec.network == "static":
            return torch.where(log_limit <= 0, 0.0, torch.inf)
        return log_limit.exp().to(dtype).float()

    def read(self, x: Tensor, dial: float | Tensor, factors: selection.Factors | None = None) -> tuple[Tensor, Tensor]:
        """x [..., C] without the channels that stay closed, and the share that is read [...]; dial: its offset for x;
        factors: as in `selection.channel`."""
        log_limit = self.log_limit_at(dial)
        if self.spec.network == "static":
            gate = selection.threshold(-log_limit)
            return x * gate.to(x.dtype), gate.mean(-1).expand(x.shape[:-1])
        return selection.channel(x, log_limit, factors)


class ChannelKind(Kind):
    """Limits in front of linear layers, executed by students/execution/linear.py."""

    name = "channel"
    order = 30
    fields = ("network", "blocks", "part")
    sites = LINEAR_SITES
    over_channels = True
    in_vision_tower = False
    limits = ("log_limit", "log_gain")

    def attach(self, spec: RouterSpec, place: BlockPlace) -> None:
        for site in spec.where:
            if site.startswith(place.branch):
                place.add_channels(site, ChannelRouter(spec, place.inputs(site), place.spec.gains))

    def cost(self, spec: RouterSpec, cost: BlockCost) -> None:
        """Channels of closed heads and groups are closed channels already, and not counted twice."""
        for site in set(spec.where) - cost.shape.opaque:
            cost.read[site] = cost.share(spec, f"{site}.channel", missing=0.0)  # no token entered this branch

    def fixes_shapes(self, spec: RouterSpec) -> bool:
        return True

    def watch(self, spec: RouterSpec, block: Watched) -> None:
        for site in spec.where:
            block.linears(site)

    def start(self, spec: RouterSpec, block: BlockStart) -> list[Choice]:
        if not self.saves(spec, block.phase):
            return []
        return [self._start_at(block, site) for site in spec.where if site not in block.shape.opaque]

    def _start_at(self, block: BlockStart, site: str) -> Choice:
        from students.calibration.observe import PRICED_ROWS
        from students.calibration.price import Choice

        router = block.linears(site)[0].get_submodule("routers.channel")
        assert isinstance(router, ChannelRouter)
        static = router.spec.network == "static"
        cost, importance, saving = (
            block.column_cost(site, PRICED_ROWS),
            block.importance(site),
            block.outputs(site) / block.dense,
        )
        cost = cost.mean(0, keepdim=True) if static else cost

        @torch.no_grad()
        def apply(price: float) -> None:
            if static:
                limit = price * saving / cost[0].clamp(min=1e-30)
            else:
                limit = 2 * price * saving / importance.clamp(min=1e-30)
            router.log_limit.copy_((limit.log() / 2).clamp(OPEN, -OPEN))

        return Choice(cost, saving, apply)


KIND = ChannelKind()
