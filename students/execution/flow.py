"""State of the tokens of images on their way through the blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from students.kernels.key_bias import key_mask


@dataclass
class Flow:
    """The tokens of a batch of images on their way through the blocks, where some stay away once they are dropped."""

    tokens: int
    """Number of tokens that each image started with."""
    score: Tensor | None = None
    """The lowest score [B, n] so far of each remaining token."""
    left: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    """For each drop: (tokens [B, n, D] before it, flat indices of those that went on, new places [B, n] of all where
    patches merge)."""
    places: Tensor | None = None
    """Original index [B, n] of each remaining token; None: all tokens remain."""
    valid: Tensor | None = None
    """[B, n] bool: which entries are tokens and not filling; None: all."""
    kept: Tensor | None = None
    """For mask execution: gates [B, T], 1 for remaining tokens; None: all remain."""
    size: Tensor | None = None
    """Number of patches [B, n] that each token stands for, where patches merge; None: one each."""
    stand_in: Tensor | None = None
    """For mask execution: index [B, T] of the token that each token has been merged into; None: itself."""
    so_far: list[tuple[float, int]] = field(default_factory=list)
    """(Patches lost by rounding, patches left) after the blocks so far (see Runtime.patches_kept)."""

    _mask: Tensor | None = None

    def resize(self, size: Tensor) -> None:
        """Set the sizes, and drop the mask made of the old ones."""
        self.size, self._mask = size, None

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """Return the additive attention mask [B, 1, n, n], the logarithm of each key's size; None: all are 1."""
        if self.size is not None and self._mask is None:
            self._mask = key_mask(self.size, dtype)
        return self._mask

    def back(self, x: Tensor) -> Tensor:
        """Return all tokens [B, T, D]: a dropped token as it was when dropped, or as the token that it merged into."""
        for before, rows, stand_in in reversed(self.left):
            x = before.flatten(0, 1).index_copy(0, rows, x.flatten(0, 1)).view_as(before)
            if stand_in is not None:
                x = at_places(x, stand_in)
        return x


def at_places(x: Tensor, places: Tensor) -> Tensor:
    """Return the tokens of x [B, n, D] at places [B, k]."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
