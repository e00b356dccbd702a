"""Places of a frozen model where kinds of routers attach their modules: its input, its blocks, its LM head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from students.architectures.lookup import (
    Linear,
    Sizes,
    can_be_read_in_part,
    matrices_of,
    mixer_macs,
    record_in,
    shape_of,
)
from students.architectures.record import Architecture
from students.compute import BlockShape
from students.execution.activation import FusedActivation, kind_of
from students.execution.attention import route_attention
from students.execution.block import BlockGather
from students.execution.block_context import BlockContext
from students.execution.branch import RoutedBranch, RoutedExit
from students.execution.image_block import RoutedBlock
from students.execution.linear import GatedLinear, RoutedLinear, join_product
from students.execution.linear_group import LinearGroup
from students.execution.mixture import HeldMixture, RoutedExperts, WithMixture
from students.execution.runtime import Runtime
from students.execution.wrapper import Wrapper
from students.families.image_pruning import PruningPoint
from students.routers import ChannelRouter, ImageRouter, Lora, Router, Substitute
from students.sites import BRANCHES, LINEAR_SITES, Branch
from students.spec import RouterSpec, StudentSpec

M = TypeVar("M", bound=nn.Module)


@dataclass
class InputPlace:
    """The place where image tokens enter the language model of a vision-language model.

    trunk: the language model. beside: a module on the device for routers. width: of the residual stream. gains: as in
    StudentSpec.
    """

    trunk: PreTrainedModel
    beside: nn.Module
    width: int
    gains: bool

    def add_router(self, router: ImageRouter) -> None:
        """Put a router into the language model, as the module `door`."""
        self.trunk.door = _like(self.beside, PruningPoint(router))


@dataclass
class HeadPlace:
    """The LM head of a model; gains: as in StudentSpec."""

    model: PreTrainedModel
    runtime: Runtime
    gains: bool
    macs: int = 0
    """Multiply-accumulates of the added modules for one token."""

    @property
    def head(self) -> nn.Module:
        head: nn.Module = self.model.get_output_embeddings()
        return head

    def replace(self, head: nn.Module) -> None:
        """Replace the model's LM head by a wrapper around it."""
        self.model.set_output_embeddings(_like(self.head, head))


class BlockPlace:
    """A block that routers are being attached to, and the costs of what is attached.

    Kind.attach is called once for each branch: `branch` is the present one, `wrapper` the module in front of it.
    number: the block's number; last: whether it is the last block.
    """

    def __init__(
        self,
        spec: StudentSpec,
        record: Architecture,
        sizes: Sizes,
        runtime: Runtime,
        number: int,
        block: nn.Module,
        last: bool,
    ) -> None:
        self.spec, self.record, self.sizes, self.runtime = spec, record_in(record, block), sizes, runtime
        self.number, self.block, self.last = number, block, last
        self.context = BlockContext()
        runtime.contexts.append(self.context)
        self.attends = bool(self.record.attn_in)
        self.routers = spec.in_block(number, self.attends)
        self.own_q = self.attends and len(record.attn_in) == 3
        self.branch: Branch = BRANCHES[0]
        self.wrappers: dict[str, RoutedBranch] = {}
        self.channels: dict[str, ChannelRouter] = {}
        """Channel routers by site."""
        self.parts: set[str] = set()
        """Branches with a router of heads or groups."""
        self.opens: set[str] = set()
        """Branches whose linear layers leave out closed parts that a token, alone in its call, chooses for itself."""
        self.narrowed: dict[str, Literal["inputs", "outputs"]] = {}
        """Linear layers, by path, whose inputs or outputs a kind leaves out by itself (neuron routers)."""
        self.around: RoutedBlock | None = None
        """The wrapper of the whole block, if a kind has put one around it (see `enclose`)."""
        self.gathers: Router | None = None
        """The router whose open tokens alone are handed to the block, norms included (see BlockGather)."""
        self.costs: dict[str, int] = {}
        """Multiply-accumulates of routers, as `BlockShape.routers`; `substitutes` and `lora` are as there too."""
        self.substitutes: dict[str, int] = {}
        self.lora: dict[str, int] = {}
        chosen = (site for router in self.routers if router.of_kind.over_channels for site in router.where)
        channels = {site.split("_")[0] for site in chosen}
        self.opaque = {site for site in LINEAR_SITES if not all(map(can_be_read_in_part, self.linears(site)))}
        """Sites with quantized layers, of which no part can be read: gates are masks there."""
        stay = channels | {site.split("_")[0] for site in self.opaque}
        self.narrows = {
            "attn": self.own_q and not record.whole_heads and "attn" not in stay,
            "mlp": "mlp" not in stay,
        }

    @property
    def wrapper(self) -> RoutedBranch:
        """The module in front of the present branch."""
        return self.wrappers[self.branch]

    def linears(self, site: str) -> list[Linear]:
        """Return the linear layers at a site."""
        layers: list[Any] = [self.block.get_submodule(name) for name in self.record.linears(site)]
        return layers

    def inputs(self, site: str) -> int:
        """Return the number of channels that a site's linear layers read."""
        return shape_of(self.linears(site)[0])[1]

    @property
    def neurons(self) -> int:
        """Number of neurons of the block's MLP."""
        return self.inputs("mlp_out")

    def add_router(self, spec: RouterSpec, key: str, gates: int = 1, members: Tensor | None = None) -> None:
        """Add a router that decides on the present branch.

        key: key of its decisions without the block's number; gates, members: as in Router.
        """
        router = Router(spec, self.sizes.width, gates, members, self.spec.gains)
        self.wrapper.routers[spec.kind] = _like(self.wrapper.base_layer, router)
        if spec.granularity == "token":
            self.costs[key] = router.macs(self.sizes.width)

    def add_substitute(self, spec: RouterSpec, key: str) -> None:
        """Add the substitute of a router of the present branch, if its specification asks for one; key: for costs."""
        if spec.substitute:
            substitute = Substitute(self.sizes.width, min(self.sizes.width, spec.substitute))
            self.wrapper.substitutes[spec.kind] = _like(self.wrapper.base_layer, substitute)
            self.substitutes[key] = substitute.macs()

    def add_parts(self, spec: RouterSpec, gates: int, channels: int) -> None:
        """Add a router of heads or groups, which divide the `channels` channels in front of the present branch's last
        linear layer into `gates` parts of equal size (give or take one)."""
        self.parts.add(self.branch)
        if self.narrows[self.branch] and spec.granularity == "token" and spec.network != "static":
            self.opens.add(self.branch)
        self.add_router(spec, f"{self.branch}.{spec.kind}", gates, torch.arange(channels) * gates // channels)

    def add_channels(self, site: str, router: ChannelRouter) -> None:
        """Add a router of the channels that a site's linear layers read."""
        self.channels[site] = _like(self.linears(site)[0], router)

    def route_experts(self, router: ChannelRouter | None = None) -> None:
        """Let experts of the block be closed, by a router of theirs or by those of the MLP that they stand beside."""
        path = self.record.beside[1] if self.record.beside else f"{self.record.mlp}.experts"
        experts = self.block.get_submodule(path)
        if not isinstance(experts, RoutedExperts):
            routed = RoutedExperts(experts, self.runtime, router, self.number, self.context)
            self.block.set_submodule(path, _like(self.block, routed))

    def _hold_mixture(self, wrapper: RoutedBranch, experts: str) -> None:
        """Let the wrapper of the MLP run the mixture of these experts, too, which the block calls for itself."""
        path = experts.rpartition(".")[0]
        held = HeldMixture(self.block.get_submodule(path), self.runtime)
        self.block.set_submodule(path, held)
        wrapper.base_layer = WithMixture(wrapper.base_layer, self.runtime, held, wrapper.context)

    def enclose(self, spec: RouterSpec) -> RoutedBlock:
        """Wrap the whole block in a RoutedBlock, which hands it the open tokens only; return the wrapper."""
        key = spec.of_kind.key(self.number, self.branch)
        routed = RoutedBlock(self.block, self.runtime, key, self.record.mask, spec.dropped, last=self.last)
        self.around = _like(self.block, routed)
        return routed

    def like(self, added: M) -> M:
        """Return an added module, moved to the block's device."""
        return _like(self.block, added)

    def elasticize(self) -> BlockShape:
        """Attach all routers and corrections to the block and wrap its modules; return the costs of the block."""
        record, sizes = self.record, self.sizes
        macs = {site: sum(math.prod(shape_of(linear)) for linear in self.linears(site)) for site in LINEAR_SITES}
        mixed = matrices_of(self.block, record) if record.mixes else ((), ())
        beside, experts = (sum(map(math.prod, shapes)) for shapes in mixed)
        if record.beside is None:
            macs["mlp_in"], beside = macs["mlp_in"] + beside, 0
        for self.branch in BRANCHES:
            self._elasticize_branch()
        join_product(self.block, record)
        if self.gathers is not None:
            norm = self.block.get_submodule(record.norm) if record.prenorm else None
            BlockGather(self.block, self.wrappers["attn"], self.gathers, norm, self.context, record.block_scale)
        q = round(macs["attn_in"] * sizes.heads / (sizes.heads + 2 * sizes.groups))
        if self.own_q or record.expand:
            q = math.prod(shape_of(self.linears("attn_in")[0]))
        *expand_q, expand_kv = [math.prod(shape_of(linear)) for linear in self.linears("expand")] or [0]
        return BlockShape(
            q=q,
            kv=macs["attn_in"] - q,
            o=macs["attn_out"] if self.attends else mixer_macs(self.block.get_submodule(record.attn)),
            mlp_in=macs["mlp_in"],
            mlp_out=macs["mlp_out"],
            per_key=sizes.per_key * self.attends,
            per_latent=sizes.per_latent,
            expand_q=sum(expand_q),
            expand_kv=expand_kv,
            window=sizes.window,
            own_q=self.own_q,
            narrows=self.narrows,
            attends=self.attends,
            mlp_experts=experts,
            mlp_beside=beside,
            follows=record.mlp_exit is None,
            enters=self.gathers is not None,
            opaque=frozenset(self.opaque),
            lora=self.lora,
            routers=self.costs,
            substitutes=self.substitutes,
        )

    def _elasticize_branch(self) -> None:
        """Attach the routers of the present branch, and put wrappers in front of it and of its linear layers."""
        branch, record = self.branch, self.record
        path, late = getattr(record, branch), getattr(record, f"{branch}_exit")
        wrapper = self.wrappers[branch] = RoutedBranch(
            self.block.get_submodule(path),
            self.runtime,
            self.number,
            branch,
            self.context,
            record,
            narrows=self.narrows[branch],
            window=self.sizes.window,
        )
        for router in self.routers:
            router.of_kind.attach(router, self)
        if branch == "mlp" and record.beside and (wrapper.routers or wrapper.decided):
            if late is None:
                self._hold_mixture(wrapper, record.beside[1])
            else:
                self.route_experts()
        for end in ("in", "out"):
            self._elasticize_site(end)
        routes = branch == "attn" and self.attends and (wrapper.routers or record.causal)
        if routes and hasattr(wrapper.base_layer, "config"):
            # timm does not look its attention function up by name, as transformers does
            route_attention(wrapper.base_layer, self.runtime, self.sizes.window)
        if wrapper.routers or wrapper.decided:
            if branch == "mlp":
                self._fuse_activation()
            self.block.set_submodule(path, wrapper)
            if late is not None:
                exit_ = self.block.get_submodule(late)
                self.block.set_submodule(late, RoutedExit(exit_, self.runtime, wrapper.context))

    def _fuse_activation(self) -> None:
        """Wrap the activation of a gated MLP that no other wrapper takes part in."""
        record = self.record
        name = f"{record.mlp}.{record.activation}"
        if len(record.mlp_in) == 2 and record.activation is not None:
            activation = self.block.get_submodule(name)
            kind = None if isinstance(activation, Wrapper) else kind_of(activation)
            if kind is not None:
                self.block.set_submodule(name, FusedActivation(activation, self.runtime, kind))

    def _elasticize_site(self, end: str) -> None:
        """Wrap the linear layers of one site, "in" or "out" of the branch, that run in part or have a correction."""
        branch, site = self.branch, f"{self.branch}_{end}"
        linears, channel = self.linears(site), self.channels.get(site)
        corrected = self.spec.lora.rank > 0 and site in self.spec.lora.sites
        keeps = any(branch in router.of_kind.touches(router) and router.kv == "keep" for router in self.routers)
        closes = self.record.causal and any(
            branch in router.of_kind.touches(router) and (branch == "mlp" or router.kv == "drop")
            for router in self.routers
            if router.of_kind.over_tokens and router.granularity == "token" and router.network != "static"
        )
        asks, gated = self.record.causal and branch == "attn" and keeps, branch in self.parts
        opens, opaque = branch in self.opens, site in self.opaque
        group = LinearGroup(f"{self.number}.{site}", self.context, ends=end == "out", opens=opens, opaque=opaque)
        for name, linear in zip(self.record.linears(site), linears, strict=True):
            first = linear is linears[0]
            per_query = asks and (end == "out" or (self.own_q and first))
            narrowed = gated and self.narrows[branch] and (branch == "mlp" or first)
            part: Literal["inputs", "outputs", ""]
            part = "inputs" if gated and end == "out" else "outputs" if narrowed and end == "in" else ""
            part = self.narrowed.get(name, part)
            context = self.wrappers[branch].context
            if channel is None and not corrected and not part and not per_query:
                if closes:
                    self.block.set_submodule(name, GatedLinear(linear, self.runtime, context, ends=end == "out"))
                continue
            routed = RoutedLinear(linear, self.runtime, group, context, part=part, per_query=per_query)
            if channel is not None:
                routed.add_channels(channel)
            if corrected:
                self._correct(routed, linear, site, first)
            self.block.set_submodule(name, routed)

    def _correct(self, routed: RoutedLinear, linear: Linear, site: str, first: bool) -> None:
        """Add a low-rank correction and count its cost, apart for the factor that closed heads or groups narrow."""
        rank = self.spec.lora.rank
        outputs, inputs = shape_of(linear)
        routed.lora = _like(linear, Lora(inputs, outputs, rank))
        cost = site if site != "attn_in" else "q" if first and self.own_q else "kv"
        always, narrowed = (inputs, outputs) if site.endswith("in") else (outputs, inputs)
        if cost == "kv":
            always, narrowed = inputs + outputs, 0
        self.lora[cost] = self.lora.get(cost, 0) + rank * always
        self.lora[f"{cost}_open"] = self.lora.get(f"{cost}_open", 0) + rank * narrowed


def _like(place: nn.Module, added: M) -> M:
    """Move an added module to the device of the module it serves; its parameters stay float32."""
    return added.to(next(place.parameters()).device)
