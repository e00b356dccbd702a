"""The tokens of images on their way through the blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from students.kernels.key_bias import key_mask


@dataclass
class Flow:
    """The tokens of a batch of images on their way through the blocks, where some stay away once they are dropped."""

    tokens: int
    """How many each image started with."""
    score: Tensor | None = None
    """[B, n]: the lowest score that each token still here has had so far."""
    left: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    """(tokens before a drop [B, n, D], flat indices of those that went on, `stand_in` of then), drop by drop."""
    places: Tensor | None = None
    """[B, n]: where the tokens still here were at the start; None: all are here."""
    valid: Tensor | None = None
    """[B, n] bool: which of them are not there to fill up the shape; None: all."""
    kept: Tensor | None = None
    """[B, T] gates, for masks: 1 for tokens still here."""
    size: Tensor | None = None
    """[B, n]: how many patches each token stands for, where they merge; None: one."""
    stand_in: Tensor | None = None
    """[B, T], for masks: the place of the token that each has been merged into; None: its own."""
    so_far: list[tuple[float, int]] = field(default_factory=list)
    """What whole numbers have taken away, and how many they left (see Runtime.patches_kept)."""

    _mask: Tensor | None = None

    def resize(self, size: Tensor) -> None:
        """Set sizes."""
        self.size, self._mask = size, None

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, n, n]: log sizes, which attention adds to the scores of keys; None: all are 1."""
        if self.size is not None and self._mask is None:
            self._mask = key_mask(self.size, dtype)
        return self._mask

    def back(self, x: Tensor) -> Tensor:
        """All tokens [B, T, D], those that were dropped as they were then, or as what took them in."""
        for before, rows, stand_in in reversed(self.left):
            x = before.flatten(0, 1).index_copy(0, rows, x.flatten(0, 1)).view_as(before)
            if stand_in is not None:
                x = at_places(x, stand_in)
        return x


def at_places(x: Tensor, places: Tensor) -> Tensor:
    """The tokens x [B, n, D] at these places [B, k]."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
