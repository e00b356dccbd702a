"""Mixture routers: of the experts that a model's own router has chosen for a token, they choose those that it needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from students.architectures.record import Architecture
from students.calibration.observe import BlockObservers, BlockStart
from students.calibration.price import Choice, limits_for
from students.compute import BlockCost, Phase
from students.execution.mixture import RoutedExperts
from students.kinds.registry import Kind
from students.places import BlockPlace
from students.routers import ChannelRouter
from students.shards import open_unit
from students.spec import RouterSpec, StudentSpec


class MixtureKind(Kind):
    """A limit for the routing weight of each expert, below which the expert is not computed, so that tokens use
    different numbers of experts (as in arXiv 2403.07652, but with limits that follow from one price of compute for all
    layers). The other experts keep their weights. Executed by students/execution/mixture.py."""

    name = "mixture"
    fields = ("blocks", "part", "optional")
    in_vision_tower = False
    limits = ("log_limit", "log_gain")

    def check_model(self, spec: RouterSpec, record: Architecture, student: StudentSpec) -> None:
        if not record.mixes:
            raise ValueError(
                "a mixture router chooses among the experts of a mixture; the MLPs of this model are dense: use "
                "channel or expert routers"
            )

    def attach(self, spec: RouterSpec, place: BlockPlace) -> None:
        experts = _experts(place.block, place.record)
        if place.branch != "mlp" or experts is None:
            return
        place.route_experts(ChannelRouter(spec, experts.num_experts, place.spec.gains))

    def cost(self, spec: RouterSpec, cost: BlockCost) -> None:
        cost.left["mlp_experts"] = cost.share(spec, "mlp.mixture", missing=0.0)  # no token entered this branch

    def saves(self, spec: RouterSpec, phase: Phase) -> bool:
        """In prefill, too, an expert is not computed for tokens that have closed it."""
        return True

    def fixes_shapes(self, spec: RouterSpec) -> bool:
        return True

    def observe(self, spec: RouterSpec, block: BlockObservers) -> None:
        block.branch("mlp")
        for name in block.record.beside or ():
            block.module(name, inputs=True)

    @torch.no_grad()
    def start(self, spec: RouterSpec, block: BlockStart) -> list[Choice]:
        """Return the start of the limits. The cost of closing an expert is estimated from its routing weight and the
        mean effect of its outputs on calibration tokens, which are not known when the gate decides."""
        experts = _experts(block.block, block.record)
        if not isinstance(experts, RoutedExperts):
            return []
        open_unit(block.block)
        router, (x, index, weights) = experts.routers["mixture"], self._given(experts, block)
        sensitivity = block.seen(block.record.beside[1] if block.record.beside else "mlp").sensitivity
        effects = [
            experts.base_layer(x, one, torch.ones_like(weights[:, :1])).float().pow(2) @ sensitivity
            for one in index.split(1, 1)
        ]
        effect = torch.stack(effects, 1)
        total = torch.zeros_like(router.log_limit).index_add(0, index.flatten(), effect.flatten())
        effect_of = (total + effect.mean()) / (index.flatten().bincount(minlength=len(total)) + 1)  # rarely used: mean
        saving = block.shape.mlp_experts / index.shape[1] / block.dense
        cost = weights.float().pow(2) * effect_of[index] / 2
        return [Choice(cost, saving, limits_for(router, effect_of / 2, saving))]

    @staticmethod
    def _given(experts: nn.Module, block: BlockStart) -> Any:
        """Return what the experts are called with for the tokens seen: x [N, D], index and weights [N, k]."""
        given: list[Any] = []
        dtype = next(block.block.parameters()).dtype
        if block.record.beside is not None:
            gate, own = block.record.beside
            _, weights, index = block.block.get_submodule(gate)(block.seen(gate).x.to(dtype))
            return block.seen(own).x.to(dtype), index, weights
        mlp = block.block.get_submodule(block.record.mlp)
        with experts.register_forward_pre_hook(lambda module, args: given.append(args)):
            getattr(mlp, "base_layer", mlp)(block.seen("mlp").x.to(dtype).unsqueeze(0))
        return given[0]


def _experts(block: nn.Module, record: Architecture) -> Any:
    """Return the experts of a block; None if it has none."""
    if record.beside is not None:
        return block.get_submodule(record.beside[1])
    return getattr(block.get_submodule(record.mlp), "experts", None)


KIND = MixtureKind()
