"""Layer routers: they decide whether a token goes through a block."""

from __future__ import annotations

from dataclasses import replace

import torch

from students.architectures.record import Architecture
from students.calibration.image import ImageStart
from students.calibration.observe import BlockObservers, BlockStart
from students.calibration.price import Choice
from students.compute import BlockCost
from students.families.image import Placed
from students.kinds.registry import kinds
from students.kinds.token import TokenKind
from students.places import BlockPlace
from students.routers import Router
from students.sites import BRANCHES
from students.spec import RouterSpec, StudentSpec


class LayerKind(TokenKind):
    """A gate for each token that switches attention and MLP of a block together.

    In language models, gates are decided in front of attention and passed on to the MLP (students/execution/branch.py,
    and block.py if the whole block runs on fewer tokens). Blocks of image models are called with the open tokens only
    (students/execution/image_block.py).
    """

    name = "layer"
    fields = (*TokenKind.fields, "dropped")
    sites = ()
    over_blocks = True
    in_vision_tower = False

    def check(self, spec: RouterSpec) -> None:
        super().check(spec)
        if spec.dropped != "return" and spec.weight == "score":
            raise ValueError("tokens that stay away cannot be weighted: use `weight: none` or `dropped: return`")
        if spec.dropped == "merge" and spec.selection == "topk":
            raise ValueError("tokens merge where `selection` is quota or threshold")

    def check_model(self, spec: RouterSpec, record: Architecture, student: StudentSpec) -> None:
        super().check_model(spec, record, student)
        if record.causal:
            return
        if spec.substitute:
            raise ValueError("a layer router of an image model takes no substitute; token routers do")
        if spec.granularity == "sequence" or spec.network == "static":
            raise ValueError("a layer router of an image model decides token by token")
        if student.find("token"):
            raise ValueError(
                "image models take layer routers or token routers, not both: a layer router is both branches'"
            )

    def takes_multiple(self, spec: RouterSpec) -> bool:
        return spec.selection in ("quota", "threshold")

    def touches(self, spec: RouterSpec) -> tuple[str, ...]:
        return BRANCHES

    def concerns(self, spec: RouterSpec, block: int) -> bool:
        """Tokens that have left the sequence (`dropped`) are missing in blocks without a router, too."""
        return spec.on(block) or spec.dropped != "return"

    def without_attention(self, spec: RouterSpec) -> RouterSpec | None:
        return None

    def attach(self, spec: RouterSpec, place: BlockPlace) -> None:
        if place.record.causal:
            self._attach_in_front(spec, place)
        elif place.branch == "attn":
            self._attach_around(spec, place)

    def _attach_in_front(self, spec: RouterSpec, place: BlockPlace) -> None:
        if place.branch == "mlp":
            place.wrapper.decided = (place.wrappers["attn"].routers["layer"],)
            return
        place.add_router(spec, "layer")
        place.add_substitute(spec, "layer")
        alone = not any(
            kind.over_tokens or kind.over_parts  # their routers decide for all tokens of the block
            for kind in kinds().values()
            if kind is not self and place.spec.find(kind.name, place.number)
        )
        if spec.kv == "drop" and not spec.substitute and alone:
            place.gathers = place.wrapper.routers["layer"]

    @staticmethod
    def _attach_around(spec: RouterSpec, place: BlockPlace) -> None:
        block = place.enclose(spec)
        if spec.on(place.number):
            width = place.sizes.width
            router = Router(spec, width, 1, gains=place.spec.gains)
            block.routers["layer"] = place.like(router)
            place.costs["layer"] = router.macs(width)
            if spec.dropped == "merge":
                place.costs["match"] = width

    def cost(self, spec: RouterSpec, cost: BlockCost) -> None:
        share = cost.share(spec, "layer")
        cost.inside = cost.inside * share
        if spec.kv == "drop" or spec.dropped != "return":
            cost.written = cost.written * share
        here: torch.Tensor | float = 1.0
        number = cost.numbers[0]
        if number and cost.image and spec.dropped != "return":  # the tokens that earlier blocks have kept
            here = cost.decisions.share[f"{number - 1}.layer"]
        cost.scored["layer"] = here
        if "match" in cost.shape.routers:
            cost.scored["match"] = self._matched(here, share, cost)

    @staticmethod
    def _matched(before: torch.Tensor | float, after: torch.Tensor | float, cost: BlockCost) -> torch.Tensor:
        """Return the number [B, 1] of pairs of patches that a block compares to merge some, per token of the image."""
        before, after = (torch.as_tensor(share).expand(cost.valid.shape).detach() for share in (before, after))
        patches = before.sum(1, keepdim=True) - cost.prefix
        pairs = (patches / 2).ceil() * (patches / 2).floor()
        fewer = after.sum(1, keepdim=True) < before.sum(1, keepdim=True)
        return pairs * fewer / cost.valid.sum(1, keepdim=True)

    def observe(self, spec: RouterSpec, block: BlockObservers) -> None:
        block.branch("attn")
        block.whole()

    def start(self, spec: RouterSpec, block: BlockStart) -> list[Choice]:
        """Start the router and fit the substitute on the input of attention, to replace what the block adds."""
        saved = block.gated("attn") + block.gated("mlp") + (block.written if spec.kv == "drop" else 0)
        read, skipped = block.seen("attn"), block.seen("layer")
        return [block.skipping(spec, "attn", read, skipped, saved, scale=block.residual_scale)]

    def start_images(self, images: ImageStart, routers: list[Placed]) -> list[Choice]:
        """If closed tokens leave the sequence (`dropped`), a gate switches all later blocks, too. A token leaves at the
        first block where the cost of its absence per unit of compute saved is below the price: a block's ratio is
        therefore the lowest so far, and each router accounts for the blocks up to the next router only."""
        choices, lowest, shortens = [], None, images.student.shortens
        blocks = range(len(images.student.blocks))
        ends = [*(placed.block for placed in routers), len(blocks)][1:]
        for placed, following in zip(routers, ends, strict=True):
            number = placed.block
            own = sum(images.block(n) for n in (range(number, following) if shortens else [number]))
            tail = sum(images.block(n) for n in blocks[number:]) if shortens else own
            choice = images.choice(placed, tail)
            ratio = choice.cost / tail
            lowest = ratio if lowest is None or not shortens else torch.minimum(lowest, ratio)
            choices.append(replace(choice, cost=lowest * own, saving=own))
        return choices


KIND = LayerKind()
