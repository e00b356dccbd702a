"""Merging of patches: those with the lowest scores leave, and each is merged into the patch most like it."""

from __future__ import annotations

import pytest
import torch

from students.kernels.ops import merge_below, merge_lowest
from tests.backends import BACKENDS
from tests.students.kernels.samples import SAMPLES, Draw


def test_images_that_are_not_numbers_keep_as_many_tokens_as_others(backend: torch.device) -> None:
    x = torch.randn(2, 9, 8).to(backend)
    x[0, 3:6] = torch.nan
    zero = torch.zeros(1).to(backend)
    index = merge_lowest(x, None, None, torch.ones(8).to(backend), zero, zero[0], 1e30 + zero, 6)[3]
    assert all(sorted(set(row)) == row and row[0] >= 0 and row[-1] < 9 for row in index.tolist())


def test_more_than_may_go_cannot_leave(backend: torch.device) -> None:
    x, zero = torch.randn(1, 9, 8).to(backend), torch.zeros(1).to(backend)
    with pytest.raises(ValueError, match="every other may go"):
        merge_lowest(x, None, None, torch.ones(8).to(backend), zero, zero[0], 1e30 + zero, 4)


@torch.no_grad()
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "interpreter"], indirect=True)
def test_images_of_their_own_lengths_keep_their_order_and_bits(backend: torch.device) -> None:
    for arguments in SAMPLES["merge_below"](Draw(torch.bfloat16, backend)):
        found, again = (merge_below(*arguments) for _ in range(2))
        assert sorted(found[3][0].tolist()) == list(range(arguments[0].shape[1]))
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
