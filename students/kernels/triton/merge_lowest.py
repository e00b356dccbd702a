"""Patches that leave are taken in by the patch most like them (see merging.py): two launches for up to 256
patches an image, three for more.

Of the patches, every other one may go (goers, counted g), to one of the others (takers, counted t). The first launch
finds each goer's partner and rank, and, where one program sees a whole image, who goes; the last writes the tokens.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

WHOLE = 128
"""Goers of an image up to which one program has all of them."""
NOBODY: tl.constexpr = tl.constexpr(2**30)
NOT_NOW: tl.constexpr = tl.constexpr(1e29)
"""The score of a patch that others may merge into (see merging.py)."""


@triton.jit
def _choose(
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
    tokens,
    prefix,
    going,
    keep,
    GOERS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Who of an image's goers leaves: those with the lowest ranks, of equals the first.

    rank, partner, leaves, first, following and total are [B, going]: of goers, but first (the first goer that a taker
    takes in) and total (its size then) of takers; following: the next goer with the same partner.
    """
    own = image * going
    g = tl.arange(0, GOERS)
    here = g < going
    key = _in_order(tl.load(rank + own + g, mask=here, other=0.0))
    to = tl.load(partner + own + g, mask=here, other=-1)
    place = tl.zeros([GOERS], tl.int32)
    for start in range(0, going, TILE):
        other = start + tl.arange(0, TILE)
        there = other < going
        key_o = _in_order(tl.load(rank + own + other, mask=there, other=0.0))[None, :]
        lower = (key_o < key[:, None]) | ((key_o == key[:, None]) & (other[None, :] < g[:, None]))
        place += tl.sum((lower & there[None, :]).to(tl.int32), 1)
    goes = here & (place < tokens - keep)
    tl.store(leaves + own + g, goes.to(tl.int32), mask=here)
    tl.debug_barrier()
    next_one, first_one = tl.full([GOERS], NOBODY, tl.int32), tl.full([GOERS], NOBODY, tl.int32)
    heavier = tl.zeros([GOERS], tl.float32)
    for start in range(0, going, TILE):
        other = start + tl.arange(0, TILE)
        there = other < going
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
    tl.store(following + own + g, next_one, mask=here)
    tl.store(first + own + g, first_one, mask=here)
    tl.store(total + own + g, heavier, mask=here)
    tl.debug_barrier()
    i = tl.arange(0, TOKENS)
    exists = i < tokens
    patch = exists & (i >= prefix)
    pair = (i - prefix) // 2
    goer = patch & ((i - prefix) % 2 == 0)
    taker = patch & ((i - prefix) % 2 == 1)
    left = tl.load(leaves + own + pair, mask=goer, other=0) > 0
    remains = exists & ~left
    weight = tl.full([TOKENS], 1.0, tl.float32)
    if size is not None:
        weight = tl.load(size + image * tokens + i, mask=exists, other=1.0)
    weight += tl.load(total + own + pair, mask=taker, other=0.0)
    score = tl.full([TOKENS], NOT_NOW, tl.float32)
    score = tl.where(i < prefix, tl.load(top + i, mask=i < prefix, other=0.0), score)
    if before is not None:
        score = tl.minimum(score, tl.load(before + image * tokens + i, mask=exists, other=0.0))
    score = tl.where(goer, tl.load(rank + own + pair, mask=goer, other=0.0), score)
    at = image * keep + tl.cumsum(remains.to(tl.int32), 0) - 1
    tl.store(index + at, i.to(tl.int64), mask=remains)
    tl.store(out_size + at, weight, mask=remains)
    tl.store(out_score + at, score, mask=remains)
    where = tl.where(left, prefix + 1 + 2 * tl.load(partner + own + pair, mask=goer, other=0), i)
    tl.store(into + image * tokens + i, where.to(tl.int64), mask=exists)


@triton.jit
def _in_order(score):
    """Integers in the order of float32 numbers, NaNs at the ends, so that exactly as many leave as should."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["tokens", "prefix", "going", "keep"])
def _match(
    x,
    size,
    before,
    weight,
    bias,
    distance_weight,
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
    tokens,
    width,
    prefix,
    going,
    keep,
    root,
    GOERS: tl.constexpr,
    TILE: tl.constexpr,
    TAKERS: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The rank and the partner of the TILE goers of a program; WHOLE: and who goes, TILE being all of an image."""
    image = tl.program_id(0)
    taking = (tokens - prefix) // 2
    lane = tl.arange(0, WIDTH)
    g = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = g < going
    from_x = x + image.to(tl.int64) * tokens * width
    row = from_x + (prefix + 2 * g)[:, None] * width
    square, score = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, width, WIDTH):
        part = start + lane
        value = tl.load(row + part[None, :], mask=here[:, None] & (part < width)[None, :], other=0.0).to(tl.float32)
        by = tl.load(weight + part, mask=part < width, other=0.0).to(tl.float32)
        square += tl.sum(value * value, 1)
        score += tl.sum(value * by[None, :], 1)
    length = tl.sqrt(square)
    best, where = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.int32)
    for first_taker in range(0, taking, TAKERS):
        t = first_taker + tl.arange(0, TAKERS)
        there = t < taking
        from_t = from_x + (prefix + 1 + 2 * t)[:, None] * width
        dots, square_t = tl.zeros([TILE, TAKERS], tl.float32), tl.zeros([TAKERS], tl.float32)
        for start in range(0, width, WIDTH):
            part = start + lane
            mine = tl.load(row + part[None, :], mask=here[:, None] & (part < width)[None, :], other=0.0)
            theirs = tl.load(from_t + part[None, :], mask=there[:, None] & (part < width)[None, :], other=0.0)
            dots = tl.dot(mine, tl.trans(theirs), dots, input_precision="ieee")
            square_t += tl.sum(theirs.to(tl.float32) * theirs.to(tl.float32), 1)
        cosine = dots / tl.maximum(length, 1e-12)[:, None] / tl.maximum(tl.sqrt(square_t), 1e-12)[None, :]
        cosine = tl.where(there[None, :], cosine, float("-inf"))
        most, which = tl.max(cosine, 1, return_indices=True)
        where = tl.where(most > best, first_taker + which, where)
        best = tl.maximum(most, best)
    score = score * root / tl.maximum(length, 1e-6) + tl.load(bias).to(tl.float32)
    score += tl.load(distance_weight).to(tl.float32) * tl.log(tl.maximum(1.0 - best, 1e-3))
    if before is not None:
        score = tl.minimum(score, tl.load(before + image * tokens + prefix + 2 * g, mask=here, other=0.0))
    tl.store(rank + image * going + g, score, mask=here)
    tl.store(partner + image * going + g, where, mask=here)
    if WHOLE:
        tl.debug_barrier()
        _choose(
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
            tokens,
            prefix,
            going,
            keep,
            GOERS,
            32,
            TOKENS,
        )


@triton.jit(do_not_specialize=["tokens", "prefix", "going", "keep"])
def _choose_alone(
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
    tokens,
    prefix,
    going,
    keep,
    GOERS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    _choose(
        tl.program_id(0),
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
        tokens,
        prefix,
        going,
        keep,
        GOERS,
        TILE,
        TOKENS,
    )


@triton.jit(do_not_specialize=["tokens", "prefix", "going", "keep"])
def _take_in(x, size, first, following, index, out_size, out, tokens, width, prefix, going, keep, WIDTH: tl.constexpr):
    """One token that remains: the mean of what it stands for."""
    me = tl.program_id(0)
    image = me // keep
    i = tl.load(index + me).to(tl.int32)
    lane = tl.arange(0, WIDTH)
    here = lane < width
    from_x = x + image.to(tl.int64) * tokens * width
    own = tl.load(from_x + i * width + lane, mask=here, other=0.0)
    mean = own.to(tl.float32)
    goer = NOBODY
    if (i >= prefix) & ((i - prefix) % 2 == 1):
        goer = tl.load(first + image * going + (i - prefix) // 2)
    total = tl.load(out_size + me)
    while goer != NOBODY:
        token = prefix + 2 * goer
        share = 1.0 / total
        if size is not None:
            share = tl.load(size + image * tokens + token) / total
        other = tl.load(from_x + token * width + lane, mask=here, other=0.0).to(tl.float32)
        mean += share * (other - own.to(tl.float32))
        goer = tl.load(following + image * going + goer)
    tl.store(out + me.to(tl.int64) * width + lane, mean.to(out.dtype.element_ty), mask=here)


def merge_lowest(
    x: Tensor,
    size: Tensor | None,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    distance_weight: Tensor,
    top: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `merging.merge_lowest`."""
    x, (batch, tokens, width), prefix = x.contiguous(), x.shape, len(top)
    going = (tokens - prefix + 1) // 2
    if keep < tokens - going:
        raise ValueError(f"of {tokens - prefix} patches every other may go, which does not leave {keep - prefix}")
    given = [None if t is None else t.contiguous() for t in (size, before)]
    weight, top = weight.contiguous(), top.contiguous()
    rank, total = (x.new_empty(batch, going, dtype=torch.float32) for _ in range(2))
    partner, leaves, first, following = (x.new_empty(batch, going, dtype=torch.int32) for _ in range(4))
    sizes, scores = (x.new_empty(batch, keep, dtype=torch.float32) for _ in range(2))
    index, into = (x.new_empty(batch, count, dtype=torch.int64) for count in (keep, tokens))
    out = x.new_empty(batch, keep, width)
    if not out.numel():
        return out, sizes, scores, index, into.copy_(torch.arange(tokens, device=x.device))
    found = rank, partner, leaves, first, following, total, sizes, scores, index, into
    goers, whole = max(16, triton.next_power_of_2(going)), going <= WHOLE
    wide = x.element_size() > 2  # no tensor cores: registers are what there is least of
    block, padded = 32 if wide else 64, triton.next_power_of_2(tokens)
    tile = goers if whole else block
    _match[(batch, max(1, triton.cdiv(going, tile)))](
        *(x, *given, weight, bias, distance_weight, top, *found, tokens, width, prefix, going, keep, math.sqrt(width)),
        GOERS=goers,
        TILE=tile,
        TAKERS=block,
        WIDTH=block,
        WHOLE=whole,
        TOKENS=padded,
        num_warps=8,
        num_stages=2 if wide else 3,
    )
    if not whole:
        _choose_alone[(batch,)](
            *(*given, top, *found, tokens, prefix, going, keep), GOERS=goers, TILE=32, TOKENS=padded, num_warps=16
        )
    lanes = triton.next_power_of_2(width)
    _take_in[(batch * keep,)](
        *(x, given[0], first, following, index, sizes, out, tokens, width, prefix, going, keep),
        WIDTH=lanes,
        num_warps=max(1, min(8, lanes // 256)),
    )
    return out, sizes, scores, index, into
