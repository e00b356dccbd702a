"""How samples are spread over the processes of one command (see launch.py): round-robin, each sample in one of them.

Every process gets the same number of batches, because each pass through a model whose weights are spread (FSDP) is
everybody's. Whoever has fewer samples runs one again, and its results are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from elastic import launch
from students.calibration.data_shard import BatchInfo, DataShard
from teachers.data.left_out import LeftOut

T = TypeVar("T")


@dataclass(frozen=True)
class LocalBatch:
    """A batch of this process, by the numbers of its samples."""

    samples: range
    counts: bool
    """False for padding, whose results are left out."""

    @property
    def rows(self) -> slice:
        """The same, of a tensor that has a row for each sample."""
        return slice(self.samples.start, self.samples.stop, self.samples.step)


def local_batches(count: int, size: int = 1) -> list[LocalBatch]:
    """This process's batches, of at most `size` samples each, out of `count` samples.

    With P processes the one of rank r has the samples r, r + P, r + 2 P and so on, in this order. All processes get as
    many batches, those that have fewer samples padding, and each sample is in exactly one batch that counts. The first
    samples are in the first batches: a prefix of the batches covers a prefix of the samples.
    """
    rank, processes = launch.rank(), launch.size()
    own = range(rank, count, processes)
    number = -(-len(range(0, count, processes)) // size)  # the first process has the most
    parts = [own[first : first + size] for first in range(0, len(own), size)]
    return [LocalBatch(part, True) for part in parts] + [LocalBatch(range(1), False)] * (number - len(parts))


class ProcessShard(DataShard):
    """The shard of one of several processes, as `scatter` or `split` made it."""

    def __init__(self, local: Sequence[LocalBatch]) -> None:
        self._local = local

    def first(self, count: int) -> ProcessShard:
        """The same of the first `count` batches."""
        return ProcessShard(self._local[:count])

    def enumerate(self, batches: Sequence[T]) -> Iterator[tuple[T, BatchInfo]]:
        for batch, local in zip(batches, self._local, strict=True):
            yield batch, BatchInfo(local.samples[0], local.counts)

    def all_reduce(self, x: Tensor) -> Tensor:
        return launch.all_reduce(x)

    def all_gather(self, parts: Sequence[Tensor]) -> Tensor:
        return all_gather(parts)


def scatter(batches: Sequence[T]) -> tuple[list[T], ProcessShard]:
    """This process's batches, where each batch is one process's."""
    local = local_batches(len(batches))
    return [batches[batch.samples[0]] for batch in local], ProcessShard(local)


def split(batches: Sequence[Sequence[int]]) -> tuple[list[list[int]], ProcessShard]:
    """This process's part of each batch of sample numbers, where all processes share every batch."""
    local = [part for batch in batches for part in local_batches(len(batch), len(batch))]
    own = [[batch[number] for number in part.samples] for batch, part in zip(batches, local, strict=True)]
    return own, ProcessShard(local)


def all_gather(parts: Sequence[Tensor]) -> Tensor:
    """The rows [n, ...] that all processes have of each batch, batch by batch and in a batch by rank: in the order in
    which `scatter` gave them out."""
    own = torch.cat(list(parts))
    if launch.size() == 1:
        return own
    lengths = launch.gather([len(part) for part in parts])
    found = iter(launch.all_gather(own).split([length for each in lengths for length in each]))
    each = [[next(found) for _ in lengths[0]] for _ in lengths]
    return torch.cat([part for batch in zip(*each, strict=True) for part in batch])


def sum_over_processes(*numbers: float) -> list[float]:
    """Each of these, added up over all processes."""
    return [sum(each) for each in zip(*launch.gather(numbers), strict=True)]


def exchange_left_out(parts: Iterable[LeftOut]) -> None:
    """Let every process know what all of them have left out of their data. ValueError where that is too much of it."""
    parts = list(parts)
    for found in launch.gather([(part.keys, part.reasons) for part in parts]):
        for part, (keys, reasons) in zip(parts, found, strict=True):
            part.keys |= keys
            part.reasons |= reasons
    for part in parts:
        if part.total is not None:
            part.check(len(part), part.total)
