"""The interface of a kind of router, and all kinds by name. Code that depends on the kind of a router calls it here.

A kind is one file of this folder, which has the kind's name and ends in `KIND = ...`. `KindName` is the only list of
kinds.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

if TYPE_CHECKING:
    from torch import nn

    from students.architectures.record import Architecture
    from students.spec import RouterSpec, StudentSpec

KindName = Literal["token", "head", "expert", "neuron", "mixture", "channel", "layer", "vocab", "image"]
"""Names of all kinds, in the order in which their routers are attached to a block."""
GATED = ("granularity", "hidden", "network", "selection", "weight", "blocks", "part")
"""Fields of RouterSpec that have an effect on all kinds of routers in blocks that compute scores from tokens."""


class Kind:
    """One kind of router. The defaults are those of a router in a block that saves compute in decoding only.

    How routers of a kind execute, in the modes `mask` and `skip`, is decided by the wrappers of students/execution that
    `attach` puts around modules of the model.
    """

    name: ClassVar[str]
    """The name in `KindName`."""
    fields: ClassVar[tuple[str, ...]]
    """Names of the fields of RouterSpec that have an effect on this kind."""
    sites: ClassVar[tuple[str, ...]] = ()
    """Sites within a block that may have a router of this kind; empty if there is one site only."""
    place: ClassVar[Literal["block", "head", "input"]] = "block"
    """Place in the model: its blocks, the LM head, or the input, where image tokens enter a language model."""
    over_tokens: ClassVar[bool] = False
    """Whether a gate switches a whole branch or block for one token."""
    over_blocks: ClassVar[bool] = False
    """Whether a gate switches the whole block; it is decided in front of attention."""
    over_parts: ClassVar[bool] = False
    """Whether gates switch parts of one branch (heads, groups of neurons), any number of which may be open."""
    over_channels: ClassVar[bool] = False
    """Whether gates switch channels that the linear layers of a site read."""
    may_keep_quota: ClassVar[bool] = False
    """Whether `selection: quota` is possible: gates switch tokens, of which each image can keep its best."""
    in_vision_tower: ClassVar[bool] = True
    """Whether the vision tower of a vision-language model may have routers of this kind."""
    limits: ClassVar[tuple[str, ...]] = ("score", "log_gain")
    """Names of the router's parameters that are trained with the learning rate `train.limit_lr`: limits, scores and
    gains, as opposed to weights of linear maps."""

    def key(self, block: int, branch: str) -> str:
        """Return the key (see Decisions) of what a router in front of a branch of block number `block` decides."""
        return f"{block}.{self.name}" if self.over_blocks else f"{block}.{branch}.{self.name}"

    def check(self, spec: RouterSpec) -> None:
        """Raise ValueError if settings of a router contradict each other."""

    def check_model(self, spec: RouterSpec, record: Architecture, student: StudentSpec) -> None:
        """Raise ValueError if the model's blocks cannot have such a router, or not beside the student's other
        routers."""

    def takes_multiple(self, spec: RouterSpec) -> bool:
        """Return whether the field `multiple` has an effect on a router."""
        return spec.selection == "quota"

    def touches(self, spec: RouterSpec) -> tuple[str, ...]:
        """Return the branches that a token skips if a gate of the router is closed."""
        return ()

    def concerns(self, spec: RouterSpec, block: int) -> bool:
        """Return whether the router changes how block number `block` runs."""
        return spec.on(block)

    def without_attention(self, spec: RouterSpec) -> RouterSpec | None:
        """Return the router as it is in a block whose MLP alone is routed, because it has no attention; None: that
        block has none."""
        if not spec.where:
            return spec
        sites = tuple(site for site in spec.where if site.startswith("mlp"))
        return replace(spec, sites=sites) if sites else None

    def attach(self, spec: RouterSpec, place: Any) -> None:
        """Create a router and attach it to a place of the model (see students/places.py): a HeadPlace, an InputPlace or
        a BlockPlace, for which this is called once for each branch."""
        raise NotImplementedError

    def fixes_shapes(self, spec: RouterSpec) -> bool:
        """Return whether no tensor's shape depends on the router's decisions, so that any pass can be recorded; for
        other routers see LanguageStudent._recorded_step."""
        return False

    def saves(self, spec: RouterSpec, phase: Literal["decode", "prefill"]) -> bool:
        """Return whether a closed gate makes this phase cheaper (see students/compute.py)."""
        return phase == "decode" or spec.granularity == "sequence" or spec.network == "static"

    def cost(self, spec: RouterSpec, cost: Any) -> None:
        """Lower the open shares of a block, a students.compute.BlockCost, by what the router closes."""

    def observe(self, spec: RouterSpec, block: Any) -> None:
        """Request the activations and gradients that `start` needs, from a calibration.observe.BlockObservers."""

    def start(self, spec: RouterSpec, block: Any) -> list[Any]:
        """Return the closed-form start of the routers in one block of a language model, given what was observed (a
        calibration.observe.BlockStart): a calibration.price.Choice for each router, which is applied once the price of
        compute is known."""
        return []

    def start_images(self, images: Any, routers: list[Any]) -> list[Any]:
        """Return the closed-form start of routers (students.families.image.Placed, in the order of blocks) in an image
        model, as `start` does, from the gradients of their gates that a calibration.image.ImageStart holds."""
        return [images.choice(p, images.branch(p.block, p.branch) / p.router.gates) for p in routers]


_kinds: dict[str, Kind] = {}
"""The result of `kinds`, after its first call. torch.compile can read it, but cannot import modules."""


def kinds() -> dict[str, Kind]:
    """Return all kinds by name, in the order of `KindName`. Their files are imported at the first call only, because
    they import calibration, compute and places, which need this module themselves."""
    if not _kinds:
        _kinds.update({name: import_module(f"students.kinds.{name}").KIND for name in get_args(KindName)})
    return _kinds


def limit_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of a model's routers that `Kind.limits` names."""
    return {
        parameter
        for module in model.modules()
        for kind, router in getattr(module, "_modules", {}).get("routers", {}).items()
        for name, parameter in router.named_parameters()
        if name in kinds()[kind].limits
    }
