"""Channel routers: they choose the input channels that a linear layer reads."""

from __future__ import annotations

from students.architectures.record import Architecture
from students.calibration.observe import BlockObservers, BlockStart
from students.calibration.price import Choice, limit_choice
from students.compute import BlockCost
from students.kinds.registry import Kind
from students.places import BlockPlace
from students.routers import ChannelRouter
from students.sites import LINEAR_SITES
from students.spec import RouterSpec, StudentSpec


class ChannelKind(Kind):
    """A limit for the magnitude of each input channel of linear layers; executed by students/execution/linear.py."""

    name = "channel"
    fields = ("network", "blocks", "part")
    sites = LINEAR_SITES
    over_channels = True
    in_vision_tower = False
    limits = ("log_limit", "log_gain")

    def check(self, spec: RouterSpec) -> None:
        if spec.network == "mlp":
            raise ValueError(
                "a channel router has one limit for each channel: use `network: linear` or `network: static`"
            )

    def check_model(self, spec: RouterSpec, record: Architecture, student: StudentSpec) -> None:
        if not record.causal:
            raise ValueError(
                "a channel router saves where tokens are decoded: image models take head and expert routers"
            )
        if not set(spec.where) <= set(record.sites):
            raise ValueError(
                "the MLPs of this model are mixtures of experts, whose channels are not routed: give the channel "
                f"router `sites: [{', '.join(record.sites)}]`, or leave `sites` away"
            )

    def attach(self, spec: RouterSpec, place: BlockPlace) -> None:
        for site in spec.where:
            if site.startswith(place.branch):
                place.add_channels(site, ChannelRouter(spec, place.inputs(site), place.spec.gains))

    def cost(self, spec: RouterSpec, cost: BlockCost) -> None:
        """Lower the share of channels read. Channels of closed heads and groups are zero, so that the channel router's
        share includes them: they are not counted twice."""
        for site in set(spec.where) - cost.shape.opaque:
            cost.read[site] = cost.share(spec, f"{site}.channel", missing=0.0)  # no token entered this branch

    def fixes_shapes(self, spec: RouterSpec) -> bool:
        return True

    def observe(self, spec: RouterSpec, block: BlockObservers) -> None:
        for site in spec.where:
            block.linears(site)

    def start(self, spec: RouterSpec, block: BlockStart) -> list[Choice]:
        if not self.saves(spec, block.phase):
            return []
        return [self._start_at(block, site) for site in spec.where if site not in block.shape.opaque]

    def _start_at(self, block: BlockStart, site: str) -> Choice:
        router = block.linears(site)[0].get_submodule("routers.channel")
        assert isinstance(router, ChannelRouter)
        x = block.seen(block.record.linears(site)[0]).x
        return limit_choice(router, x, block.importance(site), block.outputs(site) / block.dense)


KIND = ChannelKind()
