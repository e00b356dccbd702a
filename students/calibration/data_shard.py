"""A process's shard of calibration data: it runs its own batches and gathers what other processes saw in theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class BatchInfo:
    """Which batch this is."""

    index: int
    """Its place among the batches of all processes, which seeds what is drawn at random for it."""
    counts: bool
    """False for padding: where processes hold parts of one model they run it together, so that a process with fewer
    batches runs one more, whose results are left out."""

    def counted(self, x: Tensor) -> Tensor:
        """The rows of x [n, ...] that count: all or none."""
        return x if self.counts else x[:0]


class DataShard:
    """The shard of a process that is alone: all batches. See elastic/data_parallel.py for that of one of several."""

    def enumerate(self, batches: Sequence[T]) -> Iterator[tuple[T, BatchInfo]]:
        """This process's batches, each with its place among those of all."""
        for index, batch in enumerate(batches):
            yield batch, BatchInfo(index, True)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        return x

    def all_gather(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows [n, ...] that each batch has given, those of all processes in the order of the batches; a batch that
        does not count gives none."""
        return torch.cat(list(parts))


def batch_generator(seed: int, index: int) -> torch.Generator:
    """The source of random numbers for the batch in this place."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)
