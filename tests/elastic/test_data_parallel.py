"""How samples are spread over processes: each counts once, and every process has the same number of batches."""

from __future__ import annotations

import math

import pytest
import torch

from elastic import launch
from elastic.data_parallel import LocalBatch, all_gather, local_batches, scatter, split


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch):
    """A function become(rank, size) that makes this process take the given rank of `size` processes."""

    def become(rank: int, size: int) -> None:
        monkeypatch.setattr(launch, "rank", lambda: rank)
        monkeypatch.setattr(launch, "size", lambda: size)

    return become


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "most"), [(1, 1), (2, 1), (7, 1), (16, 4), (17, 4), (23, 256), (40, 3)])
def test_every_sample_counts_once_and_all_have_as_many_batches(count: int, most: int, size: int, as_process):
    found: list[list[LocalBatch]] = []
    for rank in range(size):
        as_process(rank, size)
        found.append(local_batches(count, most))
    assert len({len(each) for each in found}) == 1 and len(found[0]) == math.ceil(math.ceil(count / size) / most)
    assert all(1 <= len(batch.samples) <= most and batch.samples[-1] < count for each in found for batch in each)
    counted = [sample for each in found for batch in each if batch.counts for sample in batch.samples]
    assert sorted(counted) == list(range(count))
    rows = torch.arange(count)
    assert all(rows[batch.rows].tolist() == list(batch.samples) for each in found for batch in each)
    for some in range(1, count):  # the first samples are in the first batches
        for rank in range(size):
            as_process(rank, size)
            fewer = [sample for batch in local_batches(some, most) if batch.counts for sample in batch.samples]
            whole = [sample for batch in found[rank] if batch.counts for sample in batch.samples]
            assert fewer == whole[: len(fewer)]


def test_alone_it_is_all_in_order(as_process):
    assert [(list(batch.samples), batch.counts) for batch in local_batches(5, 2)] == [
        ([0, 1], True),
        ([2, 3], True),
        ([4], True),
    ]
    assert local_batches(0, 2) == []


def test_batches_are_scattered_or_split(as_process):
    batches = [[7, 1, 5], [2]]
    scattered, parts = [], []
    for rank in range(2):
        as_process(rank, 2)
        own, shard = scatter(batches)
        scattered.append([(batch, info.index, info.counts) for batch, info in shard.enumerate(own)])
        own, shard = split(batches)
        parts.append([(batch, info.counts) for batch, info in shard.enumerate(own)])
        assert len(list(shard.first(1).enumerate(own[:1]))) == 1
    assert scattered == [[([7, 1, 5], 0, True)], [([2], 1, True)]]
    assert parts == [[([7, 5], True), ([2], True)], [([1], True), ([2], False)]]


def test_rows_are_gathered_in_the_order_of_the_batches(as_process, monkeypatch: pytest.MonkeyPatch):
    count, size = 11, 3
    x = torch.arange(2 * count).view(count, 2)
    parts = []
    for rank in range(size):
        as_process(rank, size)
        parts.append([x[batch.rows] if batch.counts else x[:0] for batch in local_batches(count)])
    monkeypatch.setattr(launch, "gather", lambda own: [[len(part) for part in each] for each in parts])
    monkeypatch.setattr(launch, "all_gather", lambda own: torch.cat([torch.cat(each) for each in parts]))
    assert all(torch.equal(all_gather(each), x) for each in parts)
