"""Patches that leave are taken in by the patch most like them (see merging.py): two launches for up to 256
patches an image, three for more.

Of the patches, every other one may go (goers, counted g), to one of the others (takers, counted t). The first launch
finds each goer's partner and rank, and, where one program sees a whole image, who goes; the last writes the tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.reference import must_leave_pairs
from students.kernels.triton.leaving import NOBODY, NOT_NOW, choose

WHOLE = 128
"""Goers of an image up to which one program has all of them."""


@triton.jit(do_not_specialize=["tokens", "prefix", "going", "keep", "multiple"])
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
    lengths,
    shift,
    counts,
    tokens,
    width,
    prefix,
    going,
    keep,
    multiple,
    root,
    GOERS: tl.constexpr,
    TILE: tl.constexpr,
    TAKERS: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The rank and the partner of the TILE goers of a program; WHOLE: and who goes, TILE being all of an image.

    Half of its lines are names of tensors, which it takes and hands to `choose`.
    """
    image = tl.program_id(0)
    length_here = tokens
    if lengths is not None:
        length_here = tl.load(lengths + image).to(tl.int32)
    taking = (length_here - prefix) // 2
    lane = tl.arange(0, WIDTH)
    g = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = g < (length_here - prefix + 1) // 2
    from_x = x + image.to(tl.int64) * tokens * width
    row = from_x + (prefix + 2 * g)[:, None] * width
    score, length = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    best, where = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.int32)
    for first_taker in range(0, taking, TAKERS):
        t = first_taker + tl.arange(0, TAKERS)
        there = t < taking
        from_t = from_x + (prefix + 1 + 2 * t)[:, None] * width
        dots, square_t = tl.zeros([TILE, TAKERS], tl.float32), tl.zeros([TAKERS], tl.float32)
        square, score = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)  # in each round, for one pass less
        for start in range(0, width, WIDTH):
            part = start + lane
            mine = tl.load(row + part[None, :], mask=here[:, None] & (part < width)[None, :], other=0.0)
            theirs = tl.load(from_t + part[None, :], mask=there[:, None] & (part < width)[None, :], other=0.0)
            dots = tl.dot(mine, tl.trans(theirs), dots, input_precision="ieee")
            square_t += tl.sum(theirs.to(tl.float32) * theirs.to(tl.float32), 1)
            value, by = mine.to(tl.float32), tl.load(weight + part, mask=part < width, other=0.0).to(tl.float32)
            square += tl.sum(value * value, 1)
            score += tl.sum(value * by[None, :], 1)
        length = tl.sqrt(square)
        cosine = dots / tl.maximum(length, 1e-12)[:, None] / tl.maximum(tl.sqrt(square_t), 1e-12)[None, :]
        cosine = tl.where(there[None, :], cosine, float("-inf"))
        most, which = tl.max(cosine, 1, return_indices=True)
        where = tl.where(most > best, first_taker + which, where)
        best = tl.maximum(most, best)
    score = score * root / tl.maximum(length, 1e-6) + tl.load(bias).to(tl.float32)
    score += tl.load(distance_weight).to(tl.float32) * tl.log(tl.maximum(1.0 - best, 1e-3))
    score = tl.where(taking > 0, score, NOT_NOW)  # there is nobody to go to
    if before is not None:
        score = tl.minimum(score, tl.load(before + image * tokens + prefix + 2 * g, mask=here, other=0.0))
    tl.store(rank + image * going + g, score, mask=here)
    tl.store(partner + image * going + g, where, mask=here)
    if WHOLE:
        tl.debug_barrier()
        choose(
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
            GOERS,
            32,
            TOKENS,
        )


@triton.jit(do_not_specialize=["tokens", "prefix", "going", "keep", "multiple"])
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
    choose(
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
        lengths,
        shift,
        counts,
        tokens,
        prefix,
        going,
        keep,
        multiple,
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


def merge_lowest(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """As `ops.merge_lowest`."""
    keep: int = rest[-1]
    must_leave_pairs(x.shape[1], len(rest[-2]), keep)
    return _merge(x, rest[:-1], keep, None, None, 1)[:-1]


def merge_below(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """As `ops.merge_below`."""
    lengths, shift, multiple = rest[-3:]
    return _merge(x, rest[:-3], x.shape[1], lengths, shift, multiple)


def _merge(
    x: Tensor,
    router: tuple[Any, ...],
    keep: int,
    lengths: Tensor | None,
    shift: Tensor | None,
    multiple: int,
) -> tuple[Tensor, ...]:
    """Both; router: what both take between x and where they end; keep: how many tokens of each image are written, of
    which fewer may be left where there are lengths."""
    size, before, weight, bias, distance_weight, top = router
    x, (batch, tokens, width), prefix = x.contiguous(), x.shape, len(top)
    going = max(1, (tokens - prefix + 1) // 2)
    given = [None if t is None else t.contiguous() for t in (size, before)]
    weight, top = weight.contiguous(), top.contiguous()
    rank, total = (x.new_empty(batch, going, dtype=torch.float32) for _ in range(2))
    partner, leaves, first, following = (x.new_empty(batch, going, dtype=torch.int32) for _ in range(4))
    sizes, scores = (x.new_empty(batch, keep, dtype=torch.float32) for _ in range(2))
    index, into = (x.new_empty(batch, count, dtype=torch.int64) for count in (keep, tokens))
    out, counts = x.new_empty(batch, keep, width), x.new_empty(batch, dtype=torch.int64)
    if not out.numel():
        return out, sizes, scores, index, into.copy_(torch.arange(tokens, device=x.device)), counts.fill_(0)
    own = [None if t is None else t.contiguous() for t in (lengths, shift)]
    found = rank, partner, leaves, first, following, total, sizes, scores, index, into, *own, counts
    goers, whole = max(16, triton.next_power_of_2(going)), going <= WHOLE
    wide = x.element_size() > 2  # no tensor cores: registers are what there is least of
    block, padded = 32 if wide else 64, triton.next_power_of_2(tokens)
    tile = goers if whole else block
    counted = prefix, going, keep, multiple
    _match[(batch, max(1, triton.cdiv(going, tile)))](
        *(x, *given, weight, bias, distance_weight, top, *found, tokens, width, *counted, math.sqrt(width)),
        GOERS=goers,
        TILE=tile,
        TAKERS=block,
        WIDTH=block,
        WHOLE=whole,
        TOKENS=padded,
        num_warps=8,
        num_stages=2 if wide else 4,
    )
    if not whole:
        _choose_alone[(batch,)](
            *(*given, top, *found, tokens, *counted), GOERS=goers, TILE=32, TOKENS=padded, num_warps=16
        )
    lanes = triton.next_power_of_2(width)
    _take_in[(batch * keep,)](
        *(x, given[0], first, following, index, sizes, out, tokens, width, prefix, going, keep),
        WIDTH=lanes,
        num_warps=max(1, min(8, lanes // 256)),
    )
    return out, sizes, scores, index, into, counts
