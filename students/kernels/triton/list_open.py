"""The decision which tokens are open, and their list, in a launch of a single program that loops over all tokens."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from students.kernels.triton.launching import launched

BLOCK = 2048
"""Tokens in a step of the loop."""


@launched(do_not_specialize=["count"])
def _list_open(
    score,
    bias,
    limit,
    is_open,
    table,
    before,
    upto,
    count,
    DECIDES: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    found = tl.sum(tl.zeros([BLOCK], tl.int32), 0)
    for start in range(0, count, BLOCK):
        place = start + lane
        here = place < count
        value = tl.load(score + place, mask=here, other=0)
        if DECIDES:
            wide = value.to(tl.float32)
            if BIASED:  # rounded as torch's sum is
                wide = (wide + tl.load(bias).to(tl.float32)).to(score.dtype.element_ty).to(tl.float32)
            one = ((wide >= tl.load(limit)) & here).to(tl.int32)
        else:
            one = ((value != 0) & here).to(tl.int32)
        so_far = found + tl.cumsum(one, 0)
        tl.store(is_open + place, one.to(tl.uint8), mask=here)
        tl.store(before + place, so_far - one, mask=here)
        tl.store(upto + place, so_far, mask=here)
        tl.store(table + so_far - one, place.to(tl.int64), mask=one != 0)
        found += tl.sum(one, 0)
    for start in range(0, count, BLOCK):
        place = start + lane
        last = tl.full([BLOCK], 0, tl.int64) + (count - 1)
        tl.store(table + place, last, mask=(place >= found) & (place < count))


def list_open(score: Tensor, bias: Tensor | None, limit: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.list_open` in Triton."""
    count, device = score.numel(), score.device
    is_open = torch.empty(score.shape, dtype=torch.bool, device=device)
    table = torch.empty(count, dtype=torch.long, device=device)
    # each begins at a multiple of 16 bytes whatever `count` is, which Triton compiles for
    before, upto = (torch.empty(count, dtype=torch.int32, device=device) for _ in range(2))
    given = score.contiguous()
    _list_open[(1,)](
        given.view(torch.uint8) if limit is None else given,
        *(bias, limit, is_open.view(torch.uint8), table, before, upto, count),
        DECIDES=limit is not None,
        BIASED=bias is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return is_open, table, before, upto
