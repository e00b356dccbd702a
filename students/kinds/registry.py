"""Kinds of routers, by name: whatever the rest of the project has to ask about one is asked here.

A kind is one file of this folder, which has its name and ends in `KIND = ...`; nothing but `KindName` lists kinds.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from torch import nn

from students.architectures import Architecture

if TYPE_CHECKING:
    from students.spec import RouterSpec, StudentSpec

KindName = Literal["token", "head", "expert", "neuron", "channel", "layer", "vocab", "image"]
"""All kinds, in the order in which they are put into a block, and listed."""
GATED = ("granularity", "hidden", "network", "selection", "weight", "blocks", "part")
"""Fields of RouterSpec that all routers with a score for each token take."""


class Kind:
    """What one kind of router is. A kind overrides what is different from a router inside a block that saves in decode.

    How it executes, as masks and by skipping, is up to the wrappers of students/execution that `attach` puts in place.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    """The fields of RouterSpec that have an effect."""
    sites: ClassVar[tuple[str, ...]] = ()
    """Where in a block it may stand; nothing where there is one place only."""
    place: ClassVar[Literal["block", "head", "input"]] = "block"
    """In the blocks of a model, at the LM head, or where image tokens enter a language model."""
    over_tokens: ClassVar[bool] = False
    """Whether a gate leaves out a branch or block for one token."""
    over_blocks: ClassVar[bool] = False
    """Whether one decision, in front of attention, is for the whole block."""
    over_parts: ClassVar[bool] = False
    """Whether gates are among the parts of one branch, of which a token may have any number."""
    over_channels: ClassVar[bool] = False
    """Whether gates are among the channels that the linear layers of a site read."""
    may_keep_quota: ClassVar[bool] = False
    """Whether it decides between tokens, so that every image can keep its best ones."""
    in_vision_tower: ClassVar[bool] = True
    """Whether it may stand in the vision tower of a vision-language model."""
    limits: ClassVar[tuple[str, ...]] = ("score", "log_gain")
    """Parameters of the router that learn at `train.limit_lr`: numbers that gates are compared with, not maps."""

    def key(self, block: int, branch: str) -> str:
        """Of what it decides in front of a branch of a block."""
        return f"{block}.{self.name}" if self.over_blocks else f"{block}.{branch}.{self.name}"

    def check(self, spec: RouterSpec) -> None:
        """ValueError where settings contradict each other."""

    def check_model(self, spec: RouterSpec, record: Architecture, student: StudentSpec) -> None:
        """ValueError where a router cannot stand in the blocks of such a model, or not beside the student's others."""

    def takes_multiple(self, spec: RouterSpec) -> bool:
        """Whether `multiple` has an effect."""
        return spec.selection == "quota"

    def touches(self, spec: RouterSpec) -> tuple[str, ...]:
        """The branches that its closed gates leave out for a token."""
        return ()

    def concerns(self, spec: RouterSpec, block: int) -> bool:
        """Whether block number `block` runs differently because of it."""
        return spec.on(block)

    def attach(self, spec: RouterSpec, place: Any) -> None:
        """Put a router in its place: a students.places.HeadPlace or InputPlace, or, for one branch of a block after the
        other, a BlockPlace."""
        raise NotImplementedError

    def fixes_shapes(self, spec: RouterSpec) -> bool:
        """Whether steps of decoding have the same shapes whatever it decides, so that they can be recorded (see
        students/execution/fixed.py)."""
        return False

    def saves(self, spec: RouterSpec, phase: Literal["decode", "prefill"]) -> bool:
        """Whether a closed gate makes this phase cheaper (see students/compute.py)."""
        return phase == "decode" or spec.granularity == "sequence" or spec.network == "static"

    def cost(self, spec: RouterSpec, cost: Any) -> None:
        """Say what is open of a block, for whose multiply-accumulates it counts: a students.compute.BlockCost."""

    def observe(self, spec: RouterSpec, block: Any) -> None:
        """Say what its closed-form start in a language model needs: to a block's calibration.observe.BlockObservers."""

    def start(self, spec: RouterSpec, block: Any) -> list[Any]:
        """Its routers in one block of a language model, before the price is known: of a calibration.observe.BlockStart,
        a calibration.price.Choice each."""
        return []

    def start_images(self, images: Any, routers: list[Any]) -> list[Any]:
        """Its routers in an image model (students.families.image.Placed) before the price is known, block by block, as
        in `start`: from gradients of their gates, that a calibration.image.ImageStart has seen."""
        return [images.choice(p, images.branch(p.block, p.branch) / p.router.gates) for p in routers]


@cache
def kinds() -> dict[str, Kind]:
    """All kinds by name, in their order; imported at the first call, since they import whatever they have a say in."""
    return {name: import_module(f"students.kinds.{name}").KIND for name in get_args(KindName)}


def limit_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of a model's routers that are limits (see Kind.limits)."""
    return {
        parameter
        for module in model.modules()
        for kind, router in getattr(module, "_modules", {}).get("routers", {}).items()
        for name, parameter in router.named_parameters()
        if name in kinds()[kind].limits
    }
