"""Rotary embeddings of queries and keys in one launch, and their gradients in another, rounded after each step as by
torch's operators."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton.chaining import chained, follow
from students.kernels.triton.launching import launched

HEADS = 8
"""Heads of a token that one program rotates."""


@triton.jit
def _turn(
    x,
    out,
    cos,
    sin,
    row,
    place,
    column,
    by_row,
    by_head,
    by_place,
    heads,
    group,
    places,
    size,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BACK: tl.constexpr,
):
    """Rotate some heads of one token, and write them side by side. BACK: rotate by the transposed matrix, for the
    gradient."""
    own, part = group * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
    kind = x.dtype.element_ty
    half = column // 2
    mask = (own < heads)[:, None] & (part < half)[None, :]
    source = x + row * by_row + place * by_place + own[:, None] * by_head + part[None, :]
    target = out + ((row * places + place) * heads + own[:, None]) * size + part[None, :]
    here = part < half
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    for second in tl.static_range(2):
        gain = tl.load(cos + second * half + part, mask=here, other=0.0).to(tl.float32)[None, :]
        turn = tl.load(sin + (1 - second if BACK else second) * half + part, mask=here, other=0.0).to(tl.float32)
        straight = ((high if second else low) * gain).to(kind).to(tl.float32)
        across = ((low if second else high) * turn[None, :]).to(kind).to(tl.float32)
        across = -across if second == BACK else across
        tl.store(target + second * half, (straight + across).to(kind), mask=mask)
    for start in range(column, size, HALF):  # channels that are not rotated
        mask = (own < heads)[:, None] & (start + part < size)[None, :]
        tl.store(target + start, tl.load(source + start, mask=mask, other=0.0), mask=mask)


@launched(do_not_specialize=["tokens"])
def _rotary(
    query,
    key,
    cos,
    sin,
    turned_query,
    turned_key,
    tokens,
    query_heads,
    key_heads,
    query_row,
    query_head,
    query_place,
    key_row,
    key_head,
    key_place,
    angle_row,
    size,
    column,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    BACK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    row, place = (tl.program_id(0) // tokens).to(tl.int64), tl.program_id(0) % tokens
    cos += row * angle_row + place * column
    sin += row * angle_row + place * column
    group = tl.program_id(1)
    if group < QUERIES:
        _turn(
            *(query, turned_query, cos, sin, row, place, column, query_row, query_head, query_place),
            *(query_heads, group, tokens, size, HALF, HEADS, BACK),
        )
    else:
        _turn(
            *(key, turned_key, cos, sin, row, place, column, key_row, key_head, key_place),
            *(key_heads, group - QUERIES, tokens, size, HALF, HEADS, BACK),
        )


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.rotary` in Triton."""
    return _launch(query, key, cos, sin, back=False)


def rotary_grad(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.rotary_grad` in Triton."""
    return _launch(query, key, cos, sin, back=True)


def _launch(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, size = query.shape
    key_heads, width = key.shape[1], cos.shape[-1]
    turned = query.new_empty(batch, tokens, heads, size).transpose(1, 2)
    turned_key = query.new_empty(batch, tokens, key_heads, size).transpose(1, 2)
    if not batch * tokens:
        return turned, turned_key
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    cos, sin = cos.contiguous(), sin.contiguous()
    groups, more = -(-heads // HEADS), -(-key_heads // HEADS)
    _rotary[batch * tokens, groups + more](
        *(query, key, cos, sin, turned, turned_key, tokens, heads, key_heads),
        *(*query.stride()[:3], *key.stride()[:3], 0 if cos.shape[0] == 1 else tokens * width, size, width),
        HALF=1 << (width // 2 - 1).bit_length(),
        HEADS=HEADS,
        QUERIES=groups,
        BACK=back,
        CHAINED=chained(query.device),
        launch_pdl=chained(query.device),
        num_warps=2,
        enable_fp_fusion=False,  # a product and a sum would be rounded once, where torch rounds twice
    )
    return turned, turned_key
