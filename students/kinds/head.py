"""Head routers: they choose attention heads for each token."""

from __future__ import annotations

from typing import ClassVar

from students.architectures.record import Architecture
from students.calibration.observe import BlockObservers, BlockStart
from students.calibration.price import Choice
from students.compute import BlockCost
from students.kinds.registry import GATED, Kind
from students.places import BlockPlace
from students.spec import RouterSpec, StudentSpec


class HeadKind(Kind):
    """A gate for each attention head, decided in students/execution/branch.py; attention.py and linear.py compute the
    open heads only. Subclasses have gates for parts of another branch."""

    name = "head"
    fields: ClassVar[tuple[str, ...]] = GATED
    over_parts = True
    branch = "attn"

    def parts(self, spec: RouterSpec, place: BlockPlace) -> tuple[int, int]:
        """Return (number of gates, number of channels in front of the branch's last linear layer)."""
        return place.sizes.heads, place.sizes.heads * place.sizes.size

    def check_model(self, spec: RouterSpec, record: Architecture, student: StudentSpec) -> None:
        if not record.causal and spec.granularity == "sequence" and student.find("layer"):
            raise ValueError(
                f"beside a layer router, a {self.name} router of an image model decides token by token: leave "
                "`granularity` away"
            )

    def without_attention(self, spec: RouterSpec) -> RouterSpec | None:
        return None if self.branch == "attn" else spec

    def attach(self, spec: RouterSpec, place: BlockPlace) -> None:
        if place.branch == self.branch:
            place.add_parts(spec, *self.parts(spec, place))

    def cost(self, spec: RouterSpec, cost: BlockCost) -> None:
        if cost.shape.narrows.get(self.branch, True):
            cost.parts[self.branch] = cost.share(spec, f"{self.branch}.{self.name}")

    def fixes_shapes(self, spec: RouterSpec) -> bool:
        return spec.network == "static"

    def observe(self, spec: RouterSpec, block: BlockObservers) -> None:
        block.linears(f"{self.branch}_out")
        block.branch(self.branch)

    def start(self, spec: RouterSpec, block: BlockStart) -> list[Choice]:
        opaque = any(site.startswith(self.branch) for site in block.shape.opaque)
        return block.narrowing(spec, self.branch) if self.saves(spec, block.phase) and not opaque else []


KIND = HeadKind()
