"""Merging of patches: those with the lowest scores leave, and each is merged into the patch most like it."""

from __future__ import annotations

import pytest
import torch

from students.kernels import reference
from students.kernels.merging import match, merge
from students.kernels.ops import merge_below, merge_lowest
from students.kernels.scoring import stream_score
from tests.backends import DTYPES


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("prefix", "patches", "leaving"), [(0, 2, 1), (1, 9, 5), (1, 16, 3), (5, 31, 15), (1, 8, 0)])
def test_the_lowest_scores_merge_as_match_and_merge_say(
    prefix: int, patches: int, leaving: int, dtype: torch.dtype, backend: torch.device
) -> None:
    draw = torch.Generator().manual_seed(patches)
    n, width = prefix + patches, 24
    x = torch.randn(3, n, width, generator=draw).to(backend, dtype)
    weight, bias = (torch.randn(size, generator=draw).to(backend) for size in (width, 1))
    distance_weight, top = torch.tensor(0.7).to(backend), 1e30 * torch.arange(prefix, 0, -1).to(backend)
    close = 1e-5 if dtype == torch.float32 else 0.04  # torch rounds after each step
    for sized in (False, True):
        size = torch.randint(1, 4, (3, n), generator=draw).float().to(backend) if sized else None
        before = torch.randn(3, n, generator=draw).to(backend) if sized else None
        some, sizes, scores, index, into = merge_lowest(
            x, size, before, weight, bias, distance_weight, top, n - leaving
        )
        found = match(x, prefix)
        score = stream_score(x, weight, bias) + distance_weight * found.distance
        score = score if before is None else torch.minimum(score, before)
        order = score.masked_fill(~found.may_go, torch.inf).argsort(1)
        gone = torch.zeros(3, n).to(backend).scatter(1, order[:, :leaving], 1.0)
        merged, total = merge(x, size, gone, found.target)
        for row in range(3):
            stays = gone[row] == 0
            assert index[row].tolist() == stays.nonzero().flatten().tolist()
            torch.testing.assert_close(some[row], merged[row, stays], rtol=1e-4, atol=close)
            torch.testing.assert_close(sizes[row], total[row, stays])
            goes = found.may_go[row, stays]
            torch.testing.assert_close(scores[row, goes], score[row, stays][goes], rtol=1e-2, atol=1e-2)
            assert (scores[row, :prefix] == (top if before is None else before[row, :prefix])).all()
            expected = torch.where(stays, torch.arange(n).to(backend), found.target[row])
            assert torch.equal(into[row], expected)
    with pytest.raises(ValueError, match="every other may go"):
        merge_lowest(x, None, None, weight, bias, distance_weight, top, prefix + patches // 2 - 1)


@torch.no_grad()
def test_more_patches_than_one_program_takes(backend: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    x, prefix, leaving = torch.randn(2, 300, 8, generator=draw).to(backend), 1, 100
    weight, zero = torch.randn(8, generator=draw).to(backend), torch.zeros(1).to(backend)
    some, sizes, _, index, into = merge_lowest(x, None, None, weight, zero, zero[0], 1e30 + zero, 300 - leaving)
    found, score = match(x, prefix), stream_score(x, weight, zero)
    order = score.masked_fill(~found.may_go, torch.inf).argsort(1)
    gone = torch.zeros(2, 300).to(backend).scatter(1, order[:, :leaving], 1.0)
    merged, total = merge(x, None, gone, found.target)
    for row in range(2):
        stays = gone[row] == 0
        assert torch.equal(index[row], stays.nonzero().flatten())
        torch.testing.assert_close(some[row], merged[row, stays], rtol=1e-4, atol=1e-5)
        assert torch.equal(sizes[row], total[row, stays]) and sizes[row].max() > 2
        assert torch.equal(into[row], torch.where(stays, torch.arange(300).to(backend), found.target[row]))


def test_images_that_are_not_numbers_keep_as_many_tokens_as_others(backend: torch.device) -> None:
    x = torch.randn(2, 9, 8).to(backend)
    x[0, 3:6] = torch.nan
    zero = torch.zeros(1).to(backend)
    index = merge_lowest(x, None, None, torch.ones(8).to(backend), zero, zero[0], 1e30 + zero, 6)[3]
    assert all(sorted(set(row)) == row and row[0] >= 0 and row[-1] < 9 for row in index.tolist())


@torch.no_grad()
@pytest.mark.parametrize(
    ("prefix", "n", "lengths"), [(1, 19, [19, 1, 2, 3, 12]), (0, 9, [9, 0, 1, 4]), (1, 300, [300])]
)
def test_images_of_their_own_lengths_merge_as_alone(
    prefix: int, n: int, lengths: list[int], backend: torch.device
) -> None:
    draw = torch.Generator().manual_seed(n)
    batch = len(lengths)
    x, size = torch.randn(batch, n, 8, generator=draw), torch.randint(1, 4, (batch, n), generator=draw).float()
    before, shift = (torch.randn(shape, generator=draw) for shape in ((batch, n), (batch,)))
    weight, bias = (torch.randn(count, generator=draw).to(backend) for count in (8, 1))
    router = weight, bias, torch.tensor(0.7).to(backend), 1e30 * torch.arange(prefix, 0, -1).to(backend)
    x, size, before, shift = (t.to(backend) for t in (x, size, before, shift))
    for multiple in (1, 4):
        rest = torch.tensor(lengths).to(backend), shift, multiple
        found, expected = (run(x, size, before, *router, *rest) for run in (merge_below, reference.merge_below))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert sorted(found[3][0].tolist()) == list(range(n))
        again = merge_below(x, size, before, *router, *rest)
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
