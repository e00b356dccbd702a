"""The shard of calibration data that one process runs, and collectives that merge the results of all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class BatchInfo:
    """Facts about one batch."""

    index: int
    """Index of the batch among the batches of all processes, which seeds its random draws."""
    counts: bool
    """False for a padding batch: processes that hold parts of one model must run it together, so a process with fewer
    batches runs padding, whose results are left out."""

    def counted(self, x: Tensor) -> Tensor:
        """Return all rows of x [n, ...] if this batch counts, else none."""
        return x if self.counts else x[:0]


class DataShard:
    """The shard of a single process: all batches. For that of one of several processes see elastic/data_parallel.py."""

    def enumerate(self, batches: Sequence[T]) -> Iterator[tuple[T, BatchInfo]]:
        """Yield this process's batches, each with its place among those of all processes."""
        for index, batch in enumerate(batches):
            yield batch, BatchInfo(index, True)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of x over all processes."""
        return x

    def all_gather(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the rows [n, ...] of the batches of all processes, concatenated in the order of the batches.

        parts: rows of this process's batches, none for a batch that does not count.
        """
        return torch.cat(list(parts))


def batch_generator(seed: int, index: int) -> torch.Generator:
    """Return the random generator for the batch with this index."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)
