"""The router of image tokens in front of a language model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from students.routers import selection
from students.routers.base import Router, ThinLinear
from students.spec import RouterSpec


class ImageRouter(Router):
    """Scores image tokens in front of a language model: from the token alone and, with `query`, from a bilinear form of
    rank `query` of the token and the prompt's mean text token."""

    def __init__(self, spec: RouterSpec, width: int, gains: bool = False) -> None:
        super().__init__(spec, width, 1, gains=gains)
        if spec.query:
            self.look = ThinLinear(width, spec.query, bias=False)
            self.ask = ThinLinear(width, spec.query, bias=False)
            nn.init.zeros_(self.ask.weight)

    def of_prompt(self, x: Tensor, question: Tensor) -> Tensor:
        """Return scores [B, T] of embedded tokens x [B, T, D]; question [B, T] bool: which are the prompt's text."""
        score = self.of_stream(x)
        if self.spec.query:
            unit = F.rms_norm(x, x.shape[-1:])
            asked = self.ask(selection.prompt_mean(unit, question))
            score = score + (self.look(unit) * asked).sum(-1).float() / self.spec.query**0.5
        return score

    def macs(self, width: int) -> int:
        """Return the multiply-accumulates for one token."""
        return super().macs(width) + self.spec.query * (width + 1)
