"""Attention of one new token to a cache, whose slots are read by many programs at once (split-K).

A program owns the query heads that share a key head, and a range of the slots in use, whose number is a tensor on the
device: keys and values are read once, and nothing behind the newest slot is read. Each program keeps an online softmax
of its range (arXiv 2205.14135). The partial sums go to memory, where the program that finishes last adds them up in the
order of the ranges. A second launch for this would begin only when all of the first have ended, and read as much.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton import counters, tuning
from students.kernels.triton.chaining import chained, follow
from students.kernels.triton.forward_kl import rescale_rows
from students.kernels.triton.launching import launched

AT_ONCE = 1 << 14
"""Partial sums that a program loads at once when it adds up ranges: 128 registers a thread."""


@triton.jit
def _hidden(mask, place, last):
    """Return what is added to the scores of the slots at `place`: the mask or 0, and -inf from slot `last` on."""
    if mask is None:
        return tl.where(place < last, 0.0, float("-inf"))
    else:  # Triton compiles what follows a return
        return tl.load(mask + place, mask=place < last, other=float("-inf")).to(tl.float32)


@triton.jit
def _add_up(
    partial,
    tops,
    out,
    one,
    parts,
    width,
    HEADS: tl.constexpr,
    FEW: tl.constexpr,
    SOME: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write the output of the heads of key head `one` from the partial sums of its first `parts` ranges. The sums of
    SOME heads are loaded together, which waits for memory once and not once for each range."""
    part, lane = tl.arange(0, SPLIT), tl.arange(0, WIDTH)
    for start in tl.static_range(0, FEW, SOME):
        head = start + tl.arange(0, SOME)
        there = (part < parts)[:, None] & (head < HEADS)[None, :]
        place = ((one * SPLIT + part)[:, None] * HEADS + head[None, :])[:, :, None] * width + lane[None, None, :]
        mask = there[:, :, None] & (lane < width)[None, None, :]
        sums = tl.load(partial + place, mask=mask, other=0.0, cache_modifier=".cg")
        place = tops + (one * SPLIT + part)[:, None] * 2 * HEADS + head[None, :]
        top = tl.load(place, mask=there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(place + HEADS, mask=there, other=0.0, cache_modifier=".cg")
        highest = tl.where(head < HEADS, tl.max(top, 0), 0.0)
        weight = tl.exp2(top - highest[None, :])
        whole = tl.sum(weight[:, :, None] * sums, 0) / tl.sum(weight * totals, 0)[:, None]
        place = out + (one * HEADS + head)[:, None] * width + lane[None, :]
        tl.store(place, whole.to(out.dtype.element_ty), mask=(head < HEADS)[:, None] & (lane < width)[None, :])


@launched(do_not_specialize=["window"])
def _decode_attention(
    query,
    keys,
    values,
    mask,
    slot,
    partial,
    tops,
    arrivals,
    out,
    slots,
    groups,
    query_row,
    query_head,
    key_row,
    key_head,
    key_slot,
    value_row,
    value_head,
    value_slot,
    mask_row,
    size,
    width,
    window,
    scale,
    cap,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    FEW: tl.constexpr,
    SOME: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    CAP: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Attend to one range of slots with the heads of one key head; the last program of a key head adds up the ranges.

    partial [B * K, SPLIT, HEADS, width], float32: each range's sum of values weighted by exponentials, to base 2, of
    the scores less the range's highest score. tops [B * K, SPLIT, 2, HEADS], float32: that highest score, and the sum
    of the exponentials.
    """
    follow(CHAINED)
    one, part = tl.program_id(0), tl.program_id(1)
    row, group = (one // groups).to(tl.int64), one % groups
    newest = slots - 1
    if slot is not None:
        newest = tl.load(slot).to(tl.int32)
    oldest = 0
    if window > 0:
        oldest = tl.maximum(newest - window + 1, 0)
    begin = oldest // BLOCK
    blocks = newest // BLOCK + 1 - begin
    each = tl.cdiv(blocks, SPLIT)
    parts = tl.cdiv(blocks, each)  # number of ranges with slots to read
    if part >= parts:
        return
    first = (begin + part * each) * BLOCK
    last = tl.minimum(first + each * BLOCK, newest + 1)
    own, feature, lane, step = tl.arange(0, ROWS), tl.arange(0, SIZE), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    head = group * HEADS + own
    place = query + row * query_row + head[:, None] * query_head + feature[None, :]
    q = tl.load(place, mask=(own < HEADS)[:, None] & (feature < size)[None, :], other=0.0)
    keys += row * key_row + group * key_head
    values += row * value_row + group * value_head
    if mask is not None:
        mask += row * mask_row
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    whole = tl.zeros([ROWS, WIDTH], tl.float32)
    hidden = _hidden(mask, first + step, last)  # loaded a step ahead, while keys are in flight
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        slot_ = start + step
        inside = slot_ < last
        far = slot_.to(tl.int64)
        key_mask = (feature < size)[:, None] & inside[None, :]
        key = tl.load(keys + far[None, :] * key_slot + feature[:, None], mask=key_mask, other=0.0)
        value_mask = inside[:, None] & (lane < width)[None, :]
        value = tl.load(values + far[:, None] * value_slot + lane[None, :], mask=value_mask, other=0.0)
        score = tl.dot(q, key, input_precision="ieee") * scale
        if CAP:
            score = cap * (2 * tl.sigmoid(2 * score / cap) - 1)
        score = (score + tl.where(slot_ >= oldest, hidden, float("-inf"))[None, :]) * 1.4426950408889634
        most, shrink, weight = rescale_rows(most, score)
        total = total * shrink + tl.sum(weight, 1)
        whole = tl.dot(weight.to(value.dtype), value, whole * shrink[:, None], input_precision="ieee")
        hidden = _hidden(mask, slot_ + BLOCK, last)
    shown = (own < HEADS)[:, None] & (lane < width)[None, :]
    if SPLIT == 1:
        place = out + (one * HEADS + own)[:, None] * width + lane[None, :]
        tl.store(place, (whole / total[:, None]).to(out.dtype.element_ty), mask=shown)
    else:
        mine = one * SPLIT + part
        tl.store(partial + (mine * HEADS + own)[:, None] * width + lane[None, :], whole, mask=shown)
        tl.store(tops + mine * 2 * HEADS + own, most, mask=own < HEADS)
        tl.store(tops + (mine * 2 + 1) * HEADS + own, total, mask=own < HEADS)
        tl.debug_barrier()  # all of this program's sums are written before it counts as finished
        if tl.atomic_add(arrivals + one, 1, sem="acq_rel") == parts - 1:
            tl.store(arrivals + one, 0)
            _add_up(partial, tops, out, one, parts, width, HEADS, FEW, SOME, WIDTH, SPLIT)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    slot: Tensor | None,
    scale: float,
    window: int,
    cap: float,
) -> Tensor:
    """`ops.decode_attention` in Triton."""
    batch, heads, _, size = query.shape
    groups, slots, width = keys.shape[1], keys.shape[2], values.shape[3]
    out = query.new_empty(batch, 1, heads, width)
    if not batch:
        return out
    query, keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (query, keys, values))
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    mask = None if mask is None else mask.contiguous()
    plan, each = tuning.attend(query.device), heads // groups
    few, lanes = triton.next_power_of_2(each), max(16, triton.next_power_of_2(width))
    split = plan.split(batch * groups, tuning.multiprocessors(query.device))
    many = split > 1
    _decode_attention[(batch * groups, split)](
        *(query, keys, values, mask, slot),
        query.new_empty(batch * groups, split, each, width, dtype=torch.float32) if many else None,
        query.new_empty(batch * groups, split, 2, each, dtype=torch.float32) if many else None,
        counters.zeros(query.device, batch * groups) if many else None,
        *(out, slots, groups, *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3]),
        *(0 if mask is None or len(mask) == 1 else slots, size, width, window, scale, cap),
        HEADS=each,
        ROWS=max(16, triton.next_power_of_2(each)),
        FEW=few,
        SOME=min(few, max(1, AT_ONCE // (split * lanes))),
        SIZE=max(16, triton.next_power_of_2(size)),
        WIDTH=lanes,
        BLOCK=plan.block(triton.next_power_of_2(max(size, width)), query.element_size()),
        SPLIT=split,
        CAP=cap != 0,
        STAGES=plan.stages,
        CHAINED=chained(query.device),
        launch_pdl=chained(query.device),
        num_warps=plan.warps,
    )
    return out
