"""How many of an image's patches pass a router: shares of them, rounded with the prefix to whole multiples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SoFar = list[tuple[float, int]]
"""(Patches lost by rounding, patches left) after the blocks so far, for all rows or for each."""


@dataclass(frozen=True)
class PatchCounts:
    """The rule by which the number of patches that an image keeps is rounded."""

    prefix: int
    """Number of tokens in front of the patches, which count for the multiple and are never closed."""
    multiple: int
    """The number of tokens of which an image keeps a multiple, if it keeps that many; 1: any number."""
    merges: bool
    """Whether patches merge in pairs, so that at least half of them stay."""

    def of(self, share: float, patches: int) -> int:
        """Return a share of the patches as a number; at least one token stays, prefix included."""
        if share >= 1:
            return patches
        tokens = self.prefix + max(0, round(share * patches))
        if tokens >= self.multiple:
            tokens = self.multiple * round(tokens / self.multiple)
        return min(patches, max(0 if self.prefix else 1, tokens - self.prefix))

    def after(self, shares: Sequence[float], patches: int, so_far: SoFar | None) -> list[int]:
        """Return how many of an image's `patches` patches stay for each share.

        so_far is updated in place: later blocks get back what one block rounds away, so that compute follows the shares
        more closely than to a multiple in every block. None: the blocks before closed nothing.
        """
        before = so_far or [(0.0, patches)] * len(shares)
        counts = [
            min(left, max(self._least(max(1, left // 2)), self.of(share + owed / patches, patches)))
            for share, (owed, left) in zip(shares, before, strict=True)
        ]
        if so_far is not None:
            so_far[:] = [
                (owed + min(share * patches, left) - count, count)
                for share, count, (owed, left) in zip(shares, counts, before, strict=True)
            ]
        return counts

    def near(self, wanted: Sequence[int], left: Sequence[int]) -> tuple[int, ...]:
        """Return how many of the patches `left` each image keeps, given the numbers `wanted`."""
        pairs = zip(wanted, left, strict=True)
        return tuple(
            max(self._least(math.ceil(here / 2)), self.of(count / max(here, 1), here)) for count, here in pairs
        )

    def _least(self, half: int) -> int:
        """Return how many patches must stay if merging leaves `half` of them: as many, from three multiples on (prefix
        included) rounded up to a multiple."""
        if not self.merges:
            return 0
        tokens = self.prefix + half
        if tokens >= 3 * self.multiple:
            tokens = self.multiple * math.ceil(tokens / self.multiple)
        return tokens - self.prefix
