"""How work is shared out among processes: everything once, and as many turns for each."""

from __future__ import annotations

import math

import pytest
import torch

from elastic import launch, shares
from elastic.shares import Turn, deal, divide, turns


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch):
    def become(rank: int, size: int) -> None:
        monkeypatch.setattr(launch, "rank", lambda: rank)
        monkeypatch.setattr(launch, "size", lambda: size)

    return become


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "most"), [(1, 1), (2, 1), (7, 1), (16, 4), (17, 4), (23, 256), (40, 3)])
def test_every_sample_counts_once_and_all_have_as_many_turns(count: int, most: int, size: int, as_process):
    found: list[list[Turn]] = []
    for rank in range(size):
        as_process(rank, size)
        found.append(turns(count, most))
    assert len({len(each) for each in found}) == 1 and len(found[0]) == math.ceil(math.ceil(count / size) / most)
    assert all(1 <= len(turn.samples) <= most and turn.samples[-1] < count for each in found for turn in each)
    counted = [sample for each in found for turn in each if turn.counts for sample in turn.samples]
    assert sorted(counted) == list(range(count))
    rows = torch.arange(count)
    assert all(rows[turn.rows].tolist() == list(turn.samples) for each in found for turn in each)
    for some in range(1, count):  # the first so many samples are the first turns'
        for rank in range(size):
            as_process(rank, size)
            fewer = [sample for turn in turns(some, most) if turn.counts for sample in turn.samples]
            whole = [sample for turn in found[rank] if turn.counts for sample in turn.samples]
            assert fewer == whole[: len(fewer)]


def test_alone_it_is_all_in_order(as_process):
    assert [(list(turn.samples), turn.counts) for turn in turns(5, 2)] == [([0, 1], True), ([2, 3], True), ([4], True)]
    assert turns(0, 2) == []


def test_batches_are_dealt_whole_or_divided(as_process):
    batches = [[7, 1, 5], [2]]
    dealt, divided = [], []
    for rank in range(2):
        as_process(rank, 2)
        own, share = deal(batches)
        dealt.append([(batch, look.number, look.counts) for batch, look in share.looks(own)])
        own, share = divide(batches)
        divided.append([(batch, look.counts) for batch, look in share.looks(own)])
        assert len(list(share.first(1).looks(own[:1]))) == 1
    assert dealt == [[([7, 1, 5], 0, True)], [([2], 1, True)]]
    assert divided == [[([7, 5], True), ([2], True)], [([1], True), ([2], False)]]


def test_rows_are_pooled_in_the_order_of_the_batches(as_process, monkeypatch: pytest.MonkeyPatch):
    count, size = 11, 3
    x = torch.arange(2 * count).view(count, 2)
    parts = []
    for rank in range(size):
        as_process(rank, size)
        parts.append([x[turn.rows] if turn.counts else x[:0] for turn in turns(count)])
    monkeypatch.setattr(launch, "gather", lambda own: [[len(part) for part in each] for each in parts])
    monkeypatch.setattr(launch, "pool", lambda own: torch.cat([torch.cat(each) for each in parts]))
    assert all(torch.equal(shares.pooled(each), x) for each in parts)
