"""The decision which tokens are open, from the products of a router's layers with them, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton.launching import launched

TOKENS = 32
"""Tokens that one program decides on."""


@launched(do_not_specialize=["tokens", "period"])
def _open_by_score(
    low,
    up,
    shift,
    position,
    is_open,
    tokens,
    period,
    stride,
    hidden,
    prefix,
    TOKENS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here, row = token < tokens, low + token.to(tl.int64) * stride
    kind = low.dtype.element_ty
    score = tl.load(row, mask=here, other=0.0).to(tl.float32)
    if up is not None:
        unit = tl.arange(0, HIDDEN)
        inside = unit < hidden
        x = tl.load(row[:, None] + 1 + unit[None, :], mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
        active = (0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))).to(kind).to(tl.float32)  # rounded as torch does
        grown = tl.sum(active * tl.load(up + unit, mask=inside, other=0.0).to(tl.float32)[None, :], 1)
        score = (score + grown.to(kind).to(tl.float32)).to(kind).to(tl.float32)
    is_in = score + tl.load(shift).to(tl.float32) >= 0
    if position is not None:
        is_in = is_in | (tl.load(position + token % period, mask=here, other=0) < prefix)
    tl.store(is_open + token, is_in.to(tl.uint8), mask=here)


def open_by_score(low: Tensor, up: Tensor | None, shift: Tensor, position: Tensor | None, prefix: int) -> Tensor:
    """`ops.open_by_score` in Triton."""
    is_open = torch.empty(low.shape[:-1], dtype=torch.bool, device=low.device)
    rows, hidden = low.flatten(0, -2), 0 if up is None else len(up)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    _open_by_score[(triton.cdiv(len(rows), TOKENS),)](
        *(rows, up, shift, None if position is None else position.contiguous(), is_open.view(torch.uint8)),
        *(len(rows), 1 if position is None else position.numel(), rows.stride(0), hidden, prefix),
        TOKENS=TOKENS,
        HIDDEN=max(1, triton.next_power_of_2(hidden)),
        num_warps=4,
    )
    return is_open
