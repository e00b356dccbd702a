"""How several processes share one calibration: each looks at its own batches, and comes to know what the others saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Look(NamedTuple):
    """What a batch of this process's is."""

    number: int
    """Its place among the batches of all processes; what is drawn at random for it hangs on that alone."""
    counts: bool
    """Whether what is seen in it counts. If not, it stands in for none: processes that hold parts of one model run it
    together, so each looks as often as the others."""

    def counted(self, x: Tensor) -> Tensor:
        """The rows of x [n, ...] that count: all or none."""
        return x if self.counts else x[:0]


class Share:
    """A process's share of a calibration. This one has all of it, and is told nothing by others."""

    def looks(self, batches: Sequence[T]) -> Iterator[tuple[T, Look]]:
        """Each of this process's batches, and what it is."""
        for number, batch in enumerate(batches):
            yield batch, Look(number, True)

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        return x

    def pool(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows that each look of each process has given [n, ...], none where it does not count, in the batches'
        order."""
        return torch.cat(list(parts))


def drawing(seed: int, number: int) -> torch.Generator:
    """What a batch of this number draws from."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)
