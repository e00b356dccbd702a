"""The outputs of open tokens in their places and substitutes in those of closed tokens, on the residual stream, in one
launch: only its result has the size of the tokens' outputs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton.launching import launched

TOKENS = 32
"""Tokens in a step of a program, a size at which Hopper needs no asynchronous products."""
SPAN = 128
"""Tokens of a program, which loads its part of `up` once."""
PART = 8192
"""Numbers of `up` that a program loads."""


@launched(do_not_specialize=["tokens", "rows"])
def _substitute_closed(
    some,
    before,
    is_open,
    low,
    up,
    bias,
    residual,
    out,
    tokens,
    rows,
    width,
    rank,
    stride,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
):
    lane, feature = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, RANK)
    wide, inside = lane < width, (feature < rank)[None, :]
    grown = tl.load(up + lane[:, None] * rank + feature[None, :], mask=wide[:, None] & inside, other=0.0)
    added = tl.load(bias + lane, mask=wide, other=0.0).to(tl.float32)
    for start in range(0, SPAN, TOKENS):
        token = tl.program_id(0) * SPAN + start + tl.arange(0, TOKENS)
        here, far = token < tokens, token.to(tl.int64)
        thin = tl.load(low + far[:, None] * stride + feature[None, :], mask=here[:, None] & inside, other=0.0)
        value = tl.dot(thin, tl.trans(grown), input_precision="ieee") + added[None, :]
        row = far
        if before is not None:
            row = tl.minimum(tl.load(before + token, mask=here, other=0), rows - 1).to(tl.int64)
        open_ = here & (row >= 0) & (tl.load(is_open + token, mask=here, other=0) != 0)
        both = here[:, None] & wide[None, :]
        mine = tl.load(some + row[:, None] * width + lane[None, :], mask=open_[:, None] & both, other=0.0)
        chosen = tl.where(open_[:, None], mine, value.to(mine.dtype))
        place = far[:, None] * width + lane[None, :]
        if residual is not None:
            stream = tl.load(residual + place, mask=both, other=0.0)
            chosen = (stream.to(tl.float32) + chosen.to(tl.float32)).to(mine.dtype)
        tl.store(out + place, chosen, mask=both)


def substitute_closed(some: Tensor, before: Tensor | None, is_open: Tensor, *rest: Any) -> Tensor:
    """`ops.substitute_closed` in Triton."""
    low, up, bias, residual = rest
    (tokens, rank), width = low.shape, some.shape[1]
    out = some.new_empty(tokens, width)
    if low.stride(1) != 1:
        low = low.contiguous()
    features = max(16, triton.next_power_of_2(rank))
    span, lanes = SPAN if tokens > TOKENS else TOKENS, max(16, min(128, PART // features))
    if out.numel():
        _substitute_closed[triton.cdiv(tokens, span), triton.cdiv(width, lanes)](
            *(some.contiguous(), before, is_open.contiguous().view(torch.uint8), low, up.contiguous(), bias),
            *(None if residual is None else residual.contiguous(), out, tokens, len(some), width, rank, low.stride(0)),
            TOKENS=TOKENS,
            SPAN=span,
            WIDTH=lanes,
            RANK=features,
            num_warps=8,
        )
    return out
