"""Image tokens in front of a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from students.routers import selection
from students.routers.base import Router, ThinLinear
from students.routers.registry import Kind

if TYPE_CHECKING:
    from students.places import DoorPlace
    from students.spec import RouterSpec


class ImageRouter(Router):
    """Scores image tokens at the language model's door, alone and against the question."""

    def __init__(self, spec: RouterSpec, width: int, gains: bool = False) -> None:
        super().__init__(spec, width, 1, gains=gains)
        if spec.query:
            self.look = ThinLinear(width, spec.query, bias=False)
            self.ask = ThinLinear(width, spec.query, bias=False)
            nn.init.zeros_(self.ask.weight)

    def at_door(self, x: Tensor, question: Tensor) -> Tensor:
        """Scores [B, T] of embedded tokens x [B, T, D], of which question [B, T] bool are the prompt's text."""
        score = self.of_stream(x)
        if self.spec.query:
            unit = F.rms_norm(x, x.shape[-1:])
            asked = self.ask(selection.prompt_mean(unit, question))
            score = score + (self.look(unit) * asked).sum(-1).float() / self.spec.query**0.5
        return score

    def macs(self, width: int) -> int:
        """Multiply-accumulates for one token."""
        return super().macs(width) + self.spec.query * (width + 1)


class ImageKind(Kind):
    """Which image tokens enter a language model: students/families/vision_language.py leaves the others out of the
    sequence, calibration/vision_language.py starts it."""

    name = "image"
    order = 70
    fields = ("hidden", "network", "selection", "query")
    place = "door"
    may_keep_quota = True

    def check(self, spec: RouterSpec) -> None:
        if spec.network == "static":
            raise ValueError("an image router looks at the image: use `network: linear` or `network: mlp`")

    def attach(self, spec: RouterSpec, place: DoorPlace) -> None:
        place.add_router(ImageRouter(spec, place.width, place.gains))


KIND = ImageKind()
