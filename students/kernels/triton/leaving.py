"""Which of an image's patches leave, for merge_lowest.py: part of its launches."""

from __future__ import annotations

import triton
import triton.language as tl

NOBODY: tl.constexpr = tl.constexpr(2**30)
NOT_NOW: tl.constexpr = tl.constexpr(1e29)
"""The score of a patch that others may merge into (see kernels/merging.py)."""


@triton.jit
def choose(
    image,
    size,
    before,
    top,
    rank,
    partner,
    leaves,
    first,
    following,
    total,
    out_size,
    out_score,
    index,
    into,
    lengths,
    shift,
    counts,
    tokens,
    prefix,
    going,
    keep,
    multiple,
    GOERS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Who of an image's goers leaves: those with the lowest ranks, of equals the first.

    rank, partner, leaves, first, following and total are [B, going]: of goers, but first (the first goer that a taker
    takes in) and total (its size then) of takers; following: the next goer with the same partner. Where there are
    lengths, shift and multiple say how many stay; what left, and what fills an image up, comes behind them then. (One
    function, as its three steps meet in the same tensors between barriers, whose names are a fourth of its lines.)
    """
    own = image * going
    g = tl.arange(0, GOERS)
    length = tokens
    if lengths is not None:
        length = tl.load(lengths + image).to(tl.int32)
    going_here, taking_here = (length - prefix + 1) // 2, (length - prefix) // 2
    here = g < going_here
    low = tl.load(rank + own + g, mask=here, other=0.0)
    key = _in_order(low)
    stay = keep
    if lengths is not None:
        fine = here & ((low + tl.load(shift + image) >= 0) | (taking_here == 0))
        stay = _in_multiples(taking_here + tl.sum(fine.to(tl.int32), 0), length, prefix, multiple)
    to = tl.load(partner + own + g, mask=here, other=-1)
    place = tl.zeros([GOERS], tl.int32)
    for start in range(0, going_here, TILE):
        other = start + tl.arange(0, TILE)
        there = other < going_here
        key_o = _in_order(tl.load(rank + own + other, mask=there, other=0.0))[None, :]
        lower = (key_o < key[:, None]) | ((key_o == key[:, None]) & (other[None, :] < g[:, None]))
        place += tl.sum((lower & there[None, :]).to(tl.int32), 1)
    goes = here & (place < length - stay) & (taking_here > 0)
    tl.store(leaves + own + g, goes.to(tl.int32), mask=g < going)
    tl.debug_barrier()
    next_one, first_one = tl.full([GOERS], NOBODY, tl.int32), tl.full([GOERS], NOBODY, tl.int32)
    heavier = tl.zeros([GOERS], tl.float32)
    for start in range(0, going_here, TILE):
        other = start + tl.arange(0, TILE)
        there = other < going_here
        leaving = (tl.load(leaves + own + other, mask=there, other=0) > 0)[None, :]
        to_o = tl.load(partner + own + other, mask=there, other=-1)[None, :]
        mine = leaving & (to_o == g[:, None])
        after = leaving & (to_o == to[:, None]) & (other[None, :] > g[:, None])
        next_one = tl.minimum(next_one, tl.min(tl.where(after, other[None, :], NOBODY), 1))
        first_one = tl.minimum(first_one, tl.min(tl.where(mine, other[None, :], NOBODY), 1))
        weight = tl.full([TILE], 1.0, tl.float32)
        if size is not None:
            weight = tl.load(size + image * tokens + prefix + 2 * other, mask=there, other=0.0)
        heavier += tl.sum(tl.where(mine, weight[None, :], 0.0), 1)
    tl.store(following + own + g, next_one, mask=g < going)
    tl.store(first + own + g, first_one, mask=g < going)
    tl.store(total + own + g, heavier, mask=g < going)
    tl.debug_barrier()
    i = tl.arange(0, TOKENS)
    exists = i < tokens
    patch = (i < length) & (i >= prefix)
    pair = (i - prefix) // 2
    goer = patch & ((i - prefix) % 2 == 0)
    taker = patch & ((i - prefix) % 2 == 1)
    left = tl.load(leaves + own + pair, mask=goer, other=0) > 0
    remains = (i < length) & ~left
    weight = tl.full([TOKENS], 1.0, tl.float32)
    if size is not None:
        weight = tl.load(size + image * tokens + i, mask=exists, other=1.0)
    weight += tl.load(total + own + pair, mask=taker, other=0.0)
    score = tl.full([TOKENS], NOT_NOW, tl.float32)
    score = tl.where(i < prefix, tl.load(top + i, mask=i < prefix, other=0.0), score)
    if before is not None:
        score = tl.minimum(score, tl.load(before + image * tokens + i, mask=exists, other=0.0))
    score = tl.where(goer, tl.load(rank + own + pair, mask=goer, other=0.0), score)
    at, shown = image * keep + tl.cumsum(remains.to(tl.int32), 0) - 1, remains
    if lengths is not None:
        count = tl.sum(remains.to(tl.int32), 0)
        tl.store(counts + image, count.to(tl.int64))
        gone = exists & ~remains
        at = tl.where(gone, image * keep + count + tl.cumsum(gone.to(tl.int32), 0) - 1, at)
        weight, score, shown = tl.where(gone, 1.0, weight), tl.where(gone, float("-inf"), score), exists
    tl.store(index + at, i.to(tl.int64), mask=shown)
    tl.store(out_size + at, weight, mask=shown)
    tl.store(out_score + at, score, mask=shown)
    where = tl.where(left, prefix + 1 + 2 * tl.load(partner + own + pair, mask=goer, other=0), i)
    tl.store(into + image * tokens + i, where.to(tl.int64), mask=exists)


@triton.jit
def _in_order(score):
    """Integers in the order of float32 numbers, NaNs at the ends, so that exactly as many leave as should."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _in_multiples(wanted, length, prefix, multiple):
    """As `merging.in_multiples`, for one image."""
    patches = length - prefix
    least, whole = prefix + (patches + 1) // 2, prefix + wanted
    least = tl.where(least >= 3 * multiple, (least + multiple - 1) // multiple * multiple, least)
    below, over = whole // multiple, 2 * (whole % multiple)
    up = (over > multiple) | ((over == multiple) & (below % 2 == 1))  # halves go to what is even
    whole = tl.where(whole >= multiple, multiple * (below + up.to(tl.int32)), whole)
    whole = tl.maximum(whole, tl.where(prefix > 0, 0, 1))
    return tl.where(wanted >= patches, length, tl.maximum(tl.minimum(whole, length), least))
