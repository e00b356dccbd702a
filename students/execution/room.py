"""Room for open tokens in passes of fixed shape, whose host does not know how many tokens are open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

PARTS = 64
"""Room is given in units of a pass's tokens divided by this, rounded up to a multiple of UNIT."""
UNIT = 16
"""Room is a multiple of so many tokens, as products of such sizes are fast."""


@dataclass
class Room:
    """How many open tokens a pass has room for, in the order in which its routers choose tokens.

    A pass with limits computes as many tokens as the limits say, of which the first are the open ones, and never waits
    for the device. Its result holds only if no number exceeds its limit, which is for the caller to check. Without
    limits, a pass computes what is open, and the numbers are noted.
    """

    limits: Sequence[int] | None = None
    """Number of tokens that each choice has room for; None: as many as are open."""
    valid: Tensor | None = None
    """Tokens [B, T] bool that are not padding, which is at the end of all rows; None: all."""
    numbers: list[Tensor] = field(default_factory=list)
    """Number [1] of open tokens in each choice of this pass, int32, on the device."""

    def limit(self, number: Tensor) -> int | None:
        """Note the `number` [1] of open tokens in the next choice, and return how many it has room for; None: all."""
        self.numbers.append(number)
        return None if self.limits is None else self.limits[len(self.numbers) - 1]


def room_for(numbers: Sequence[int], tokens: int, spare: int) -> list[int]:
    """Return limits for so many open tokens in each choice of a pass over `tokens` tokens, with `spare` units more."""
    unit = -(-tokens // (PARTS * UNIT)) * UNIT
    return [min(tokens, max(1, -(-number // unit) + spare) * unit) for number in numbers]
