"""How samples are distributed over the processes of one command (see launch.py): round-robin, each to one process.

Every process gets the same number of batches, because all processes take part in each forward pass if the weights are
spread (FSDP). A process with fewer samples repeats one as padding, whose results are left out.
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
    """A batch of this process."""

    samples: range
    """Numbers of the batch's samples."""
    counts: bool
    """False for padding, whose results are left out."""

    @property
    def rows(self) -> slice:
        """The samples as a slice, to index a tensor with one row for each sample."""
        return slice(self.samples.start, self.samples.stop, self.samples.step)


def local_batches(count: int, size: int = 1) -> list[LocalBatch]:
    """Return this process's batches, of at most `size` samples each, out of `count` samples.

    With P processes, rank r gets the samples r, r + P, r + 2 P and so on, in this order. All ranks get the same number
    of batches, with padding if they have fewer samples, and each sample is in exactly one batch that counts. The first
    batches of all ranks together hold the first samples.
    """
    rank, processes = launch.rank(), launch.size()
    own = range(rank, count, processes)
    number = -(-len(range(0, count, processes)) // size)  # rank 0 has the most samples
    parts = [own[first : first + size] for first in range(0, len(own), size)]
    return [LocalBatch(part, True) for part in parts] + [LocalBatch(range(1), False)] * (number - len(parts))


class ProcessShard(DataShard):
    """The DataShard of one of several processes, made by `scatter` or `split`."""

    def __init__(self, local: Sequence[LocalBatch]) -> None:
        self._local = local

    def first(self, count: int) -> ProcessShard:
        """Return the shard of only the first `count` batches."""
        return ProcessShard(self._local[:count])

    def enumerate(self, batches: Sequence[T]) -> Iterator[tuple[T, BatchInfo]]:
        for batch, local in zip(batches, self._local, strict=True):
            yield batch, BatchInfo(local.samples[0], local.counts)

    def all_reduce(self, x: Tensor) -> Tensor:
        return launch.all_reduce(x)

    def all_gather(self, parts: Sequence[Tensor]) -> Tensor:
        return all_gather(parts)


def scatter(batches: Sequence[T]) -> tuple[list[T], ProcessShard]:
    """Distribute whole batches over the processes; return this process's batches and its shard."""
    local = local_batches(len(batches))
    return [batches[batch.samples[0]] for batch in local], ProcessShard(local)


def split(batches: Sequence[Sequence[int]]) -> tuple[list[list[int]], ProcessShard]:
    """Distribute the sample numbers of every batch over all processes; return this process's parts and its shard."""
    local = [part for batch in batches for part in local_batches(len(batch), len(batch))]
    own = [[batch[number] for number in part.samples] for batch, part in zip(batches, local, strict=True)]
    return own, ProcessShard(local)


def all_gather(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all processes, given this process's rows [n, ...] of each of its batches.

    All processes have the same number of batches. Rows are ordered by batch, then rank, as `scatter` distributes them.
    """
    own = torch.cat(list(parts))
    if launch.size() == 1:
        return own
    lengths = launch.gather([len(part) for part in parts])
    found = iter(launch.all_gather(own).split([length for each in lengths for length in each]))
    each = [[next(found) for _ in lengths[0]] for _ in lengths]
    return torch.cat([part for batch in zip(*each, strict=True) for part in batch])


def sum_over_processes(*numbers: float) -> list[float]:
    """Return each number summed over all processes."""
    return [sum(each) for each in zip(*launch.gather(numbers), strict=True)]


def exchange_left_out(parts: Iterable[LeftOut]) -> None:
    """Merge into each LeftOut the samples that all processes left out; raise ValueError if these are too many."""
    parts = list(parts)
    for found in launch.gather([(part.keys, part.reasons) for part in parts]):
        for part, (keys, reasons) in zip(parts, found, strict=True):
            part.keys |= keys
            part.reasons |= reasons
    for part in parts:
        if part.total is not None:
            part.check(len(part), part.total)
