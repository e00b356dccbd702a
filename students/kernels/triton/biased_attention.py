"""Attention to keys that count several times, in one pass over the keys (arXiv 2205.14135). torch's fastest kernels
take no bias for keys, and its others are made for long sequences. Images are short: tiles of 64 waste less."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels import reference
from students.kernels.triton.forward_kl import rescale_rows
from students.kernels.triton.launching import launched

WIDEST = 128
"""Maximum channels of a head: a program holds all of them."""


@launched(do_not_specialize=["queries", "keys"])
def _biased_attention(
    query,
    key,
    value,
    number,
    out,
    queries,
    keys,
    heads,
    size,
    factor,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Attend with QUERIES queries of one head of one sequence. number [B, K]: how many times each key counts; factor:
    the scale of scores times log2(e), since exponentials are to base 2."""
    parts = tl.cdiv(queries, QUERIES)
    one, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    batch, head = (one // heads).to(tl.int64), one % heads
    kind = query.dtype.element_ty
    channel = tl.arange(0, SIZE)
    q, inside = part * QUERIES + tl.arange(0, QUERIES), channel < size
    asked = (q < queries)[:, None] & inside[None, :]
    from_key = key + batch * key_batch + head * key_head + channel[:, None]
    from_value = value + batch * value_batch + head * value_head + channel[None, :]
    from_query = query + batch * query_batch + head * query_head
    mine = tl.load(from_query + q[:, None] * query_token + channel[None, :], mask=asked, other=0.0)
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total, summed = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES, SIZE], tl.float32)
    for start in range(0, keys, KEYS):
        k = start + tl.arange(0, KEYS)
        here = k < keys
        theirs = tl.load(from_key + k[None, :] * key_token, mask=here[None, :] & inside[:, None], other=0.0)
        count = tl.load(number + batch * keys + k, mask=here, other=0.0).to(tl.float32)
        added = tl.where(count > 0, tl.log2(tl.maximum(count, 1e-30)), float("-inf"))
        score = tl.dot(mine, theirs) * factor + added[None, :]
        most, shrink, weight = rescale_rows(most, score)
        given = tl.load(from_value + k[:, None] * value_token, mask=here[:, None] & inside[None, :], other=0.0)
        total = total * shrink + tl.sum(weight, 1)
        summed = tl.dot(weight.to(kind), given, summed * shrink[:, None])
    place = ((batch * queries + q) * heads + head)[:, None] * size + channel[None, :]
    tl.store(out + place, (summed / total[:, None]).to(kind), mask=asked)


def biased_attention(query: Tensor, key: Tensor, value: Tensor, size: Tensor, scale: float) -> Tensor:
    """`ops.biased_attention` in Triton."""
    batch, heads, queries, width = query.shape
    if width > WIDEST or query.dtype == torch.float32:  # no tensor cores in float32: torch's kernel is as fast
        return reference.biased_attention(query, key, value, size, scale)
    out, size = query.new_empty(batch, queries, heads, width), size.contiguous()
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    padded = max(16, triton.next_power_of_2(width))
    if out.numel():
        _biased_attention[(triton.cdiv(queries, 64) * batch * heads,)](  # a second dimension ends at 65,535
            *(query, key, value, size, out, queries, key.shape[2], heads, width, scale * math.log2(math.e)),
            *(stride for x in (query, key, value) for stride in x.stride()[:3]),
            QUERIES=64,
            KEYS=64 if padded <= 64 else 32,
            SIZE=padded,
            num_warps=4 if padded <= 64 else 8,
            num_stages=3,
        )
    return out
