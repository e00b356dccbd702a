"""How the processes of one command share out the samples of a piece of work (see launch.py).

Every process has the same number of turns, and runs the model as often in each of them as the others do: where
processes hold parts of one model (FSDP), each pass through it is everybody's. Who has fewer samples runs one once more,
and what comes of it does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from elastic import launch
from students.calibration.share import Look, Share
from teachers.data.left_out import LeftOut

T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """Samples that a process works on together, by number."""

    samples: range
    counts: bool
    """Whether what comes of them counts."""

    @property
    def rows(self) -> slice:
        """The same, of a tensor that has a row for each sample."""
        return slice(self.samples.start, self.samples.stop, self.samples.step)


def turns(count: int, most: int = 1) -> list[Turn]:
    """This process's turns at so many samples: every so manieth is its own, and at most so many are worked on together.

    They are as many in every process, and all samples are in one that counts, once. Of the first so many samples a
    process has its first turns; alone it has all, in order.
    """
    rank, size = launch.rank(), launch.size()
    own = range(rank, count, size)
    number = -(-len(range(0, count, size)) // most)  # the first process has the most
    parts = [own[first : first + most] for first in range(0, len(own), most)]
    return [Turn(part, True) for part in parts] + [Turn(range(1), False)] * (number - len(parts))


class Shared(Share):
    """What of the batches of all processes this process's are, by the turns that they are for."""

    def __init__(self, handed_out: Sequence[Turn]) -> None:
        self._turns = handed_out

    def first(self, count: int) -> Shared:
        """The same of so many batches."""
        return Shared(self._turns[:count])

    def looks(self, batches: Sequence[T]) -> Iterator[tuple[T, Look]]:
        for batch, turn in zip(batches, self._turns, strict=True):
            yield batch, Look(turn.samples[0], turn.counts)

    def total(self, x: Tensor) -> Tensor:
        return launch.total(x)

    def pool(self, parts: Sequence[Tensor]) -> Tensor:
        return pooled(parts)


def deal(batches: Sequence[T]) -> tuple[list[T], Shared]:
    """This process's batches, of which each is one process's."""
    handed_out = turns(len(batches))
    return [batches[turn.samples[0]] for turn in handed_out], Shared(handed_out)


def divide(batches: Sequence[Sequence[int]]) -> tuple[list[list[int]], Shared]:
    """This process's part of each of these batches of samples, of which all are everybody's."""
    handed_out = [turn for batch in batches for turn in turns(len(batch), len(batch))]
    own = [[batch[number] for number in turn.samples] for batch, turn in zip(batches, handed_out, strict=True)]
    return own, Shared(handed_out)


def pooled(parts: Sequence[Tensor]) -> Tensor:
    """The rows that each turn of each process has given [n, ...], where it counts: turn by turn, and in a turn process
    by process, which is the order of batches that were dealt."""
    own = torch.cat(list(parts))
    if launch.size() == 1:
        return own
    lengths = launch.gather([len(part) for part in parts])
    found = iter(launch.pool(own).split([length for each in lengths for length in each]))
    each = [[next(found) for _ in lengths[0]] for _ in lengths]
    return torch.cat([part for turn in zip(*each, strict=True) for part in turn])


def sums(*numbers: float) -> list[float]:
    """Each of these, added up over all processes."""
    return [sum(each) for each in zip(*launch.gather(numbers), strict=True)]


def tell(parts: Iterable[LeftOut]) -> None:
    """Let every process know what all of them have left out of their data. ValueError where that is too much of it."""
    parts = list(parts)
    for found in launch.gather([(part.keys, part.reasons) for part in parts]):
        for part, (keys, reasons) in zip(parts, found, strict=True):
            part.keys |= keys
            part.reasons |= reasons
    for part in parts:
        if part.total is not None:
            part.check(len(part), part.total)
