"""The rows of open tokens in their places among all tokens, in one launch that reads no row in vain."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton.launching import launched


@launched(do_not_specialize=["tokens", "rows"])
def _put_open(
    some,
    before,
    is_open,
    other,
    out,
    tokens,
    rows,
    width,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token, lane = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    here, wide = token < tokens, (lane < width)[None, :]
    row = tl.minimum(tl.load(before + token, mask=here, other=0), rows - 1).to(tl.int64)
    open_ = here & (row >= 0) & (tl.load(is_open + token, mask=here, other=0) != 0)  # without rows none can be read
    value = tl.load(some + row[:, None] * width + lane[None, :], mask=open_[:, None] & wide, other=0)
    place = token.to(tl.int64)[:, None] * width + lane[None, :]
    if other is not None:
        rest = tl.load(other + place, mask=(here & ~open_)[:, None] & wide, other=0)
        value = tl.where(open_[:, None], value, rest)
    tl.store(out + place, value, mask=here[:, None] & wide)


def put_open(some: Tensor, before: Tensor, is_open: Tensor, other: Tensor | None) -> Tensor:
    """`ops.put_open` in Triton."""
    tokens, (rows, width) = len(before), some.shape
    out = torch.empty(tokens, width, dtype=some.dtype, device=some.device)
    lanes = triton.next_power_of_2(width)
    each = max(1, 2048 // lanes)
    if out.numel():
        _put_open[(triton.cdiv(tokens, each),)](
            *(some.contiguous(), before, is_open.contiguous().view(torch.uint8)),
            *(None if other is None else other.contiguous(), out, tokens, rows, width),
            TOKENS=each,
            WIDTH=lanes,
            num_warps=max(4, min(16, lanes // 1024)),
        )
    return out
