"""Merging of patches that leave into the patch most similar to them (see merging.py), in two launches.

Every other patch may leave (goers, indexed g), into one of the remaining patches (takers, indexed t). The first launch
finds each goer's partner and rank, which is its score. In the second launch each program finds out which goers of an
image leave, and writes some of the tokens that stay: a launch of its own to find this out once would take longer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels import merging
from students.kernels.triton.launching import launched
from students.kernels.triton.sum_norm import layer_norm

NOBODY: tl.constexpr = tl.constexpr(2**30)
NOT_NOW: tl.constexpr = tl.constexpr(merging.NOT_NOW)
"""The score of a patch that others may merge into (see ../merging.py)."""
PROGRAMS = 792
"""Maximum programs of the second launch, unless there are more images: six for each multiprocessor of a large GPU."""
PAIRS = 2**12
"""Pairs of goers that a program compares at a time."""


@triton.jit
def _of_eights(x):
    """Return the sums of eight neighbours each of x [N, M], which one thread holds."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), 2)


@launched(do_not_specialize=["tokens", "prefix", "going"])
def _match(
    x,
    before,
    weight,
    bias,
    distance_weight,
    lengths,
    rank,
    partner,
    tokens,
    width,
    prefix,
    going,
    root,
    TILE: tl.constexpr,
    TAKERS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the rank and the partner [B, going] of TILE goers of an image."""
    image = tl.program_id(0)
    length = tokens
    if lengths is not None:
        length = tl.load(lengths + image).to(tl.int32)
    taking = (length - prefix) // 2
    lane = tl.arange(0, WIDTH)
    g = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = g < (length - prefix + 1) // 2
    from_x = x + image.to(tl.int64) * tokens * width
    row = from_x + (prefix + 2 * g)[:, None] * width
    score, square = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    best, where = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.int32)
    for first_taker in range(0, taking, TAKERS):
        t = first_taker + tl.arange(0, TAKERS)
        there = t < taking
        from_t = from_x + (prefix + 1 + 2 * t)[:, None] * width
        dots, squares_t = tl.zeros([TILE, TAKERS], tl.float32), tl.zeros([TAKERS, WIDTH // 8], tl.float32)
        squares, scores = tl.zeros([TILE, WIDTH // 8], tl.float32), tl.zeros([TILE, WIDTH // 8], tl.float32)
        for start in range(0, width, WIDTH):
            part = start + lane
            mine = tl.load(row + part[None, :], mask=here[:, None] & (part < width)[None, :], other=0.0)
            theirs = tl.load(from_t + part[None, :], mask=there[:, None] & (part < width)[None, :], other=0.0)
            dots = tl.dot(mine, tl.trans(theirs), dots, input_precision="ieee")
            squares_t += _of_eights(theirs.to(tl.float32) * theirs.to(tl.float32))
            value, by = mine.to(tl.float32), tl.load(weight + part, mask=part < width, other=0.0).to(tl.float32)
            squares += _of_eights(value * value)
            scores += _of_eights(value * by[None, :])
        square_t, square, score = tl.sum(squares_t, 1), tl.sum(squares, 1), tl.sum(scores, 1)  # in every round
        cosine = dots / tl.maximum(tl.sqrt(square), 1e-12)[:, None] / tl.maximum(tl.sqrt(square_t), 1e-12)[None, :]
        cosine = tl.where(there[None, :], cosine, float("-inf"))
        most, which = tl.max(cosine, 1, return_indices=True)
        where = tl.where(most > best, first_taker + which, where)
        best = tl.maximum(most, best)
    score = score * root / tl.maximum(tl.sqrt(square), 1e-6) + tl.load(bias).to(tl.float32)
    score += tl.load(distance_weight).to(tl.float32) * tl.log(tl.maximum(1.0 - best, 1e-3))
    score = tl.where(taking > 0, score, NOT_NOW)  # there is no taker
    if before is not None:
        score = tl.minimum(score, tl.load(before + image * tokens + prefix + 2 * g, mask=here, other=0.0))
    tl.store(rank + image * going + g, score, mask=here)
    tl.store(partner + image * going + g, where, mask=here)


@triton.jit
def _in_order(score):
    """Return integers in the order of float32 scores, NaNs at the ends, so that exactly as many goers leave as should;
    no result is the lowest integer, so that 1 can be subtracted."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x7FFFFFFF)


@triton.jit
def _in_multiples(wanted, length, prefix, multiple):
    """Return `merging.in_multiples` for one image."""
    patches = length - prefix
    least, whole = prefix + (patches + 1) // 2, prefix + wanted
    least = tl.where(least >= 3 * multiple, (least + multiple - 1) // multiple * multiple, least)
    below, over = whole // multiple, 2 * (whole % multiple)
    up = (over > multiple) | ((over == multiple) & (below % 2 == 1))  # halves are rounded to even
    whole = tl.where(whole >= multiple, multiple * (below + up.to(tl.int32)), whole)
    whole = tl.maximum(whole, tl.where(prefix > 0, 0, 1))
    return tl.where(wanted >= patches, length, tl.maximum(tl.minimum(whole, length), least))


@launched(do_not_specialize=["tokens", "prefix", "going", "keep", "multiple"])
def _take_in(
    x,
    size,
    before,
    top,
    lengths,
    shift,
    rank,
    partner,
    out,
    out_size,
    out_score,
    index,
    into,
    counts,
    gain,
    offset,
    normed,
    tokens,
    width,
    prefix,
    going,
    keep,
    multiple,
    epsilon,
    GOERS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write some of an image's tokens, ROWS at a time, after the goers with the lowest ranks have left; of equal ranks
    the first leaves first.

    A token is the mean of the patches that it stands for; with a gain, its layer norm is written too. With lengths,
    shift and multiple determine how many tokens stay, and the tokens that left and the padding follow behind. (One
    function, because all of it follows from which goers leave. A third of its lines are names of tensors.)
    """
    image = tl.program_id(0)
    g, own, lane = tl.arange(0, GOERS), image * going, tl.arange(0, WIDTH)
    length = tokens
    if lengths is not None:
        length = tl.load(lengths + image).to(tl.int32)
    going_here, taking_here = (length - prefix + 1) // 2, (length - prefix) // 2
    here = g < going_here
    low, to = tl.load(rank + own + g, mask=here, other=0.0), tl.load(partner + own + g, mask=here, other=0)
    stay = keep
    if lengths is not None:
        fine = here & ((low + tl.load(shift + image) >= 0) | (taking_here == 0))
        stay = _in_multiples(taking_here + tl.sum(fine.to(tl.int32), 0), length, prefix, multiple)
    key, place = _in_order(low), tl.zeros([GOERS], tl.int32)
    for start in range(0, going_here, TILE):
        other = start + tl.arange(0, TILE)
        there = other < going_here
        key_o = _in_order(tl.load(rank + own + other, mask=there, other=0.0))
        lower = key_o[None, :] - (other[None, :] < g[:, None]).to(tl.int32) < key[:, None]
        place += tl.sum((lower & there[None, :]).to(tl.int32), 1)
    leaves = here & (place < length - stay) & (taking_here > 0)
    left = leaves.to(tl.int32)
    gone = tl.cumsum(left, 0)
    count = length - tl.sum(left, 0)
    goer_at = tl.where(here, tl.where(leaves, count + gone - 1, prefix + 2 * g - gone), -1)
    taker_at = tl.where(g < taking_here, prefix + 2 * g + 1 - gone, -1)
    if tl.program_id(1) == 0:
        moved = into + image * tokens + prefix + 2 * g
        tl.store(moved, (prefix + tl.where(leaves, 2 * to + 1, 2 * g)).to(tl.int64), mask=prefix + 2 * g < tokens)
        tl.store(moved + 1, (prefix + 2 * g + 1).to(tl.int64), mask=prefix + 2 * g + 1 < tokens)
        tl.store(into + image * tokens + g, g.to(tl.int64), mask=g < prefix)
        if lengths is not None:
            tl.store(counts + image, count.to(tl.int64))
    weight = tl.full([GOERS], 1.0, tl.float32)
    if size is not None:
        weight = tl.load(size + image * tokens + prefix + 2 * g, mask=here, other=0.0)
    from_x = x + image.to(tl.int64) * tokens * width
    for start in range(tl.program_id(1) * ROWS, keep, tl.num_programs(1) * ROWS):
        j = start + tl.arange(0, ROWS)
        shown = j < keep
        is_goer, is_taker = goer_at[None, :] == j[:, None], taker_at[None, :] == j[:, None]
        patch = tl.sum(tl.where(is_goer, 2 * g[None, :], 0) + tl.where(is_taker, 2 * g[None, :] + 1, 0), 1)
        among = (j >= prefix) & (j < length)
        i = tl.where(among, prefix + patch, j)
        taker = among & (patch % 2 == 1)
        mine = leaves[None, :] & (to[None, :] == tl.where(taker, patch // 2, -1)[:, None])
        total = tl.full([ROWS], 1.0, tl.float32)
        if size is not None:
            total = tl.load(size + image * tokens + i, mask=shown, other=1.0)
        total += tl.sum(tl.where(mine, weight[None, :], 0.0), 1)
        score = tl.where(j < prefix, tl.load(top + j, mask=j < prefix, other=0.0), NOT_NOW)
        if before is not None:
            score = tl.minimum(score, tl.load(before + image * tokens + i, mask=shown, other=0.0))
        goer = among & (patch % 2 == 0)
        score = tl.where(goer, tl.load(rank + own + patch // 2, mask=goer, other=0.0), score)
        row, wide = from_x + i.to(tl.int64)[:, None] * width + lane[None, :], (lane < width)[None, :]
        first = tl.load(row, mask=shown[:, None] & wide, other=0.0).to(tl.float32)
        mean = first
        comes = tl.min(tl.where(mine, g[None, :], NOBODY), 1)
        while tl.min(comes, 0) < NOBODY:
            token, some = prefix + 2 * comes, comes < NOBODY
            share = 1.0 / total
            if size is not None:
                share = tl.load(size + image * tokens + token, mask=some, other=0.0) / total
            there = some[:, None] & wide
            other = tl.load(from_x + token[:, None] * width + lane[None, :], mask=there, other=0.0).to(tl.float32)
            mean += tl.where(there, share[:, None] * (other - first), 0.0)
            comes = tl.min(tl.where(mine & (g[None, :] > comes[:, None]), g[None, :], NOBODY), 1)
        if lengths is not None:
            total, score = tl.where(j < count, total, 1.0), tl.where(j < count, score, float("-inf"))
        at = image * keep + j
        tl.store(index + at, i.to(tl.int64), mask=shown)
        tl.store(out_size + at, total, mask=shown)
        tl.store(out_score + at, score, mask=shown)
        place_out = at.to(tl.int64)[:, None] * width + lane[None, :]
        kind = out.dtype.element_ty
        tl.store(out + place_out, mean.to(kind), mask=shown[:, None] & wide)
        if gain is not None:
            rounded, here_out = mean.to(kind).to(tl.float32), shown[:, None] & wide
            layer_norm(rounded, gain, offset, lane, width, epsilon, normed, place_out, here_out)


def merge_lowest(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`ops.merge_lowest` in Triton."""
    keep: int = rest[-1]
    merging.must_leave_pairs(x.shape[1], len(rest[-2]), keep)
    return _merge(x, rest[:-1], keep)[:-1]


def merge_normed(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`ops.merge_normed` in Triton."""
    *router, top, keep, gain, offset, epsilon = rest
    merging.must_leave_pairs(x.shape[1], len(top), keep)
    normed = x.new_empty(len(x), keep, x.shape[-1])
    return normed, *_merge(x, (*router, top), keep, norm=(gain, offset, normed), epsilon=epsilon)[:-1]


def merge_below(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`ops.merge_below` in Triton."""
    lengths, shift, multiple = rest[-3:]
    return _merge(x, rest[:-3], x.shape[1], lengths, shift, multiple)


def _merge(
    x: Tensor,
    router: tuple[Any, ...],
    keep: int,
    lengths: Tensor | None = None,
    shift: Tensor | None = None,
    multiple: int = 1,
    norm: tuple[Tensor | None, ...] = (None, None, None),
    epsilon: float = 0.0,
) -> tuple[Tensor, ...]:
    """Run both launches and return the results of `ops.merge_below`. router: the operators' arguments from size to top;
    keep: how many tokens of each image are written, of which fewer may be left if there are lengths; norm: gain and
    offset of a layer norm, and the tensor [B, keep, D] that its output is written to."""
    x, (batch, tokens, width) = x.contiguous(), x.shape
    size, before, weight, bias, distance_weight, top, lengths, shift, *norm_of = (
        None if t is None else t.contiguous() for t in (*router, lengths, shift, *norm)
    )
    prefix = len(router[-1])
    going = max(1, (tokens - prefix + 1) // 2)
    rank, partner = x.new_empty(batch, going, dtype=torch.float32), x.new_empty(batch, going, dtype=torch.int32)
    sizes, scores = (x.new_empty(batch, keep, dtype=torch.float32) for _ in range(2))
    index, into = (x.new_empty(batch, count, dtype=torch.int64) for count in (keep, tokens))
    out, counts = x.new_empty(batch, keep, width), x.new_empty(batch, dtype=torch.int64)
    if not out.numel():
        return out, sizes, scores, index, into.copy_(torch.arange(tokens, device=x.device)), counts.fill_(0)
    wide = x.element_size() > 2  # float32 has no tensor cores: registers are the scarcest resource
    block = 32 if wide else 64
    _match[(batch, triton.cdiv(going, 32))](
        *(x, before, weight, bias, distance_weight, lengths, rank, partner),
        *(tokens, width, prefix, going, math.sqrt(width)),
        TILE=32,
        TAKERS=32 if wide else 128,
        WIDTH=block,
        num_warps=8,
        num_stages=2 if wide else 3,
    )
    lanes, goers = triton.next_power_of_2(width), max(16, triton.next_power_of_2(max(going, prefix)))
    rows = max(1, min(8, 2048 // lanes))
    _take_in[(batch, min(triton.cdiv(keep, rows), max(1, PROGRAMS // batch)))](
        *(x, size, before, top, lengths, shift, rank, partner, out, sizes, scores, index, into, counts, *norm_of),
        *(tokens, width, prefix, going, keep, multiple, epsilon),
        GOERS=goers,
        TILE=min(goers, max(16, PAIRS // goers)),
        ROWS=rows,
        WIDTH=lanes,
        num_warps=4 if goers <= 128 else 8,
    )
    return out, sizes, scores, index, into, counts
