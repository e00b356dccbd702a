"""Logits that are exact where a preview reaches a limit and guessed elsewhere; their forward KL, for which they are
computed while reading and never stored; and the gradients of both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton.forward_kl import add_logits, write_row
from students.kernels.triton.launching import launched


@launched()
def _row_gate(exact, preview, limit, tail, out, share, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    kind = exact.dtype.element_ty
    least = tl.load(limit + row).to(kind).to(tl.float32)
    added = tl.load(tail).to(kind).to(tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        here = token < vocabulary
        guess = tl.load(preview + row * vocabulary + token, mask=here, other=0.0).to(tl.float32)
        keep = (guess >= least) & here
        value = tl.load(exact + row * vocabulary + token, mask=keep, other=0.0)
        tl.store(out + row * vocabulary + token, tl.where(keep, value, (guess + added).to(kind)), mask=here)
        count += keep.to(tl.int32)
    tl.store(share + row, tl.div_rn(tl.sum(count, 0).to(tl.float32), (vocabulary + 0.0).to(tl.float32)))


@triton.jit
def _chosen(exact, preview, least, added, here):
    """Return previews, exact logits, guesses, and exact logits where the preview reaches `least` and guesses elsewhere;
    all in float32. Selecting equals the gate's products in the reference, which are exact."""
    kind = exact.dtype.element_ty
    guess = tl.load(preview, mask=here, other=0.0).to(tl.float32)
    value = tl.load(exact, mask=here, other=0.0).to(tl.float32)
    other = (guess + added).to(kind).to(tl.float32)
    return guess, value, other, tl.where(guess >= least, value, other)


@launched(do_not_specialize=["rows"])
def _routed_kl(exact, preview, teacher, limit, tail, value, share, logs, rows, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    kind = exact.dtype.element_ty
    least = tl.load(limit + row).to(kind).to(tl.float32)
    added = tl.load(tail).to(kind).to(tl.float32)
    most_s, most_t = float("-inf"), float("-inf")
    sum_s, sum_t = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    apart, count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        here = token < vocabulary
        place = row * vocabulary + token
        guess, _, _, s = _chosen(exact + place, preview + place, least, added, here)
        s = tl.where(here, s, float("-inf"))
        t = tl.load(teacher + place, mask=here, other=float("-inf")).to(tl.float32)
        count += ((guess >= least) & here).to(tl.int32)
        most_s, most_t, sum_s, sum_t, apart = add_logits(s, t, most_s, most_t, sum_s, sum_t, apart)
    write_row(value, logs, row, rows, most_s, most_t, sum_s, sum_t, apart)
    tl.store(share + row, tl.div_rn(tl.sum(count, 0).to(tl.float32), (vocabulary + 0.0).to(tl.float32)))


@launched(do_not_specialize=["rows"])
def _row_gate_grad(
    source,
    price,
    exact,
    preview,
    limit,
    tail,
    logs,
    grad,
    to_exact,
    to_preview,
    to_limit,
    to_tail,
    rows,
    vocabulary,
    BLOCK: tl.constexpr,
):
    """Write the gradients of a row of logits. source: the gradient by the logits, or with `logs` and `grad` the
    teacher's logits, of which the gradient of the divergence follows."""
    row = tl.program_id(0).to(tl.int64)
    kind = exact.dtype.element_ty
    threshold = tl.load(limit + row).to(tl.float32)
    least = threshold.to(kind).to(tl.float32)
    lower, upper = (threshold - 0.5).to(kind).to(tl.float32), (threshold + 0.5).to(kind).to(tl.float32)
    added = tl.load(tail).to(kind).to(tl.float32)
    cost = tl.load(price + row).to(tl.float32) / vocabulary
    if logs is not None:
        log_s, log_t, by = tl.load(logs + row), tl.load(logs + rows + row), tl.load(grad + row).to(tl.float32)
    slope, rest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        here = token < vocabulary
        place = row * vocabulary + token
        guess, value, other, s = _chosen(exact + place, preview + place, least, added, here)
        out = tl.load(source + place, mask=here, other=0.0)
        if logs is not None:
            out = ((tl.exp(s - log_s) - tl.exp(out.to(tl.float32) - log_t)) * by).to(kind)
        keep = guess >= least
        near = (guess >= lower) & (guess < upper) & here
        tl.store(to_exact + place, tl.where(keep, out, 0.0), mask=here)
        tl.store(to_preview + place, tl.where(keep, 0.0, out), mask=here)
        out = out.to(tl.float32)
        rest += tl.where(keep | ~here, 0.0, out)
        slope += tl.where(near, (value - other) * out + cost, 0.0)
    tl.store(to_limit + row, -tl.sum(slope, 0))
    tl.store(to_tail + row, tl.sum(rest, 0))


def row_gate(exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.row_gate` in Triton."""
    exact, preview, limit = exact.contiguous(), preview.contiguous(), limit.contiguous()
    vocabulary = exact.shape[-1]
    out, share = torch.empty_like(exact), exact.new_empty(exact.shape[:-1], dtype=torch.float32)
    if exact.numel():
        block = min(4096, triton.next_power_of_2(vocabulary))
        _row_gate[(share.numel(),)](exact, preview, limit, tail, out, share, vocabulary, BLOCK=block, num_warps=8)
    return out, share


def routed_kl(
    exact: Tensor, preview: Tensor, teacher: Tensor, limit: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.routed_kl` in Triton."""
    exact, preview, teacher, limit = (x.contiguous() for x in (exact, preview, teacher, limit))
    rows, vocabulary = exact.shape
    value, share, logs = (exact.new_empty(shape, dtype=torch.float32) for shape in (rows, rows, (2, rows)))
    if rows:
        block = min(4096, triton.next_power_of_2(vocabulary))
        given, found = (exact, preview, teacher, limit, tail), (value, share, logs)
        _routed_kl[(rows,)](*given, *found, rows, vocabulary, BLOCK=block, num_warps=8)
    return value, share, logs


def row_gate_grad(
    grad_out: Tensor, grad_share: Tensor, exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.row_gate_grad` in Triton."""
    exact, preview = exact.contiguous(), preview.contiguous()
    to_exact, to_preview = torch.empty_like(exact), torch.empty_like(preview)
    return to_exact, to_preview, *_gradients(grad_out, grad_share, exact, preview, limit, tail, to_exact, to_preview)


def routed_kl_grad(
    exact: Tensor,
    preview: Tensor,
    teacher: Tensor,
    limit: Tensor,
    tail: Tensor,
    logs: Tensor,
    grad: Tensor,
    grad_share: Tensor,
) -> tuple[Tensor, Tensor]:
    """`ops.routed_kl_grad` in Triton."""
    return _gradients(teacher, grad_share, exact, preview, limit, tail, exact, preview, logs, grad)


def _gradients(
    source: Tensor,
    grad_share: Tensor,
    exact: Tensor,
    preview: Tensor,
    limit: Tensor,
    tail: Tensor,
    to_exact: Tensor,
    to_preview: Tensor,
    logs: Tensor | None = None,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill to_exact and to_preview (see `_row_gate_grad`), and return the gradients by limit and tail."""
    source, grad_share, limit = source.contiguous(), grad_share.contiguous(), limit.contiguous()
    by = [None if x is None else x.contiguous() for x in (logs, grad)]
    to_limit, rest = torch.empty_like(limit), torch.zeros_like(limit, dtype=torch.float32)
    rows, vocabulary = grad_share.numel(), exact.shape[-1]
    if exact.numel():
        block = max(32, min(4096, triton.next_power_of_2(vocabulary)))
        _row_gate_grad[(rows,)](
            *(source, grad_share, exact, preview, limit, tail, *by, to_exact, to_preview, to_limit, rest),
            *(rows, vocabulary),
            BLOCK=block,
            # results may overwrite logits: no two threads may hold one token, which the later would read overwritten
            num_warps=min(8, block // 32),
        )
    return to_limit, rest.sum().to(tail.dtype)
