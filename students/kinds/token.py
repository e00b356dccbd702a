"""Token routers: they decide whether a token goes through attention, or through the MLP."""

from __future__ import annotations

from typing import ClassVar

from students.architectures.record import Architecture
from students.calibration.observe import BlockObservers, BlockStart
from students.calibration.price import Choice
from students.compute import BlockCost, Phase
from students.kinds.registry import GATED, Kind
from students.places import BlockPlace
from students.sites import BRANCHES
from students.spec import RouterSpec, StudentSpec


class TokenKind(Kind):
    """A gate for each token in front of a branch, executed by students/execution/branch.py."""

    name = "token"
    fields: ClassVar[tuple[str, ...]] = (*GATED, "kv", "substitute", "prefix")
    sites: ClassVar[tuple[str, ...]] = BRANCHES
    over_tokens = True
    may_keep_quota = True

    def check(self, spec: RouterSpec) -> None:
        if spec.selection == "topk" and spec.granularity == "sequence":
            raise ValueError("top-k over the tokens of a sequence needs `granularity: token`")
        if spec.prefix and (spec.selection, spec.granularity) != ("threshold", "token"):
            raise ValueError("`prefix` is for routers with `selection: threshold` and `granularity: token`")
        if spec.prefix and spec.network == "static":
            raise ValueError("a static router decides once for all tokens: leave `prefix` away")

    def check_model(self, spec: RouterSpec, record: Architecture, student: StudentSpec) -> None:
        if not record.causal and "attn" in self.touches(spec) and spec.kv == "keep":
            raise ValueError(f"image models keep no keys of skipped tokens: give the {self.name} router `kv: drop`")
        if not record.causal and spec.prefix:
            raise ValueError("`prefix` is for language models: leave it away")

    def touches(self, spec: RouterSpec) -> tuple[str, ...]:
        return spec.where

    def fixes_shapes(self, spec: RouterSpec) -> bool:
        return spec.network == "static" and (spec.kv == "keep" or "attn" not in self.touches(spec))

    def saves(self, spec: RouterSpec, phase: Phase) -> bool:
        return True

    def attach(self, spec: RouterSpec, place: BlockPlace) -> None:
        if place.branch in spec.where:
            place.add_router(spec, f"{place.branch}.token")
            place.add_substitute(spec, place.branch)

    def cost(self, spec: RouterSpec, cost: BlockCost) -> None:
        for branch in spec.where:
            share = cost.share(spec, f"{branch}.token")
            cost.open[branch] = cost.open[branch] * share
            if branch == "attn" and spec.kv == "drop":
                cost.written = cost.written * share

    def observe(self, spec: RouterSpec, block: BlockObservers) -> None:
        for branch in spec.where:
            block.branch(branch, moments=spec.substitute > 0)

    def start(self, spec: RouterSpec, block: BlockStart) -> list[Choice]:
        choices = []
        for branch in spec.where:
            saved = block.gated(branch) + (block.written if spec.kv == "drop" and branch == "attn" else 0)
            choices.append(block.skipping(spec, branch, block.seen(branch), block.seen(branch), saved))
        return choices


KIND = TokenKind()
