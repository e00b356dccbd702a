"""Forward KL of logits and its gradient, in one pass each: sums are made while reading, without a float32 copy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton.launching import launched


@triton.jit
def rescale(most, values):
    """Return the running maximum `most` updated with values, the same or 0 if it is -inf, and the factor by which
    earlier sums of exponentials shrink."""
    new = tl.maximum(most, tl.max(values, 0))
    safe = tl.where(new == float("-inf"), 0.0, new)  # no finite value yet
    return new, safe, tl.exp(most - safe)


@triton.jit
def add_logits(s, t, most_s, most_t, sum_s, sum_t, apart):
    """Return the running maxima, sums of exponentials and sum of p * (t - s), with the logits s (student) and t
    (teacher) added; a logit of -inf adds nothing."""
    most_s, safe_s, shrink_s = rescale(most_s, s)
    most_t, safe_t, shrink_t = rescale(most_t, t)
    weight = tl.exp(t - safe_t)
    sum_s = sum_s * shrink_s + tl.exp(s - safe_s)
    sum_t = sum_t * shrink_t + weight
    apart = apart * shrink_t + tl.where(weight > 0, weight * (t - s), 0.0)
    return most_s, most_t, sum_s, sum_t, apart


@triton.jit
def write_row(value, logs, row, rows, most_s, most_t, sum_s, sum_t, apart):
    """Write the divergence of a row, and the row's log-sum-exps of student and teacher."""
    whole = tl.sum(sum_t, 0)
    log_s, log_t = most_s + tl.log(tl.sum(sum_s, 0)), most_t + tl.log(whole)
    tl.store(value + row, tl.sum(apart, 0) / whole - (log_t - log_s))
    tl.store(logs + row, log_s)
    tl.store(logs + rows + row, log_t)


@triton.jit
def rescale_rows(most, score):
    """Return, for each row of scores [Q, K], the updated running maximum and the factor by which earlier sums of
    exponentials shrink, and the exponentials [Q, K], to base 2, of the scores less that maximum."""
    new = tl.maximum(most, tl.max(score, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # no key seen yet
    return new, tl.exp2(most - safe), tl.exp2(score - safe[:, None])


@launched(do_not_specialize=["rows"])
def _forward_kl(student, teacher, value, logs, rows, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    most_s, most_t = float("-inf"), float("-inf")
    sum_s, sum_t = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    apart = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        here = token < vocabulary
        s = tl.load(student + row * vocabulary + token, mask=here, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher + row * vocabulary + token, mask=here, other=float("-inf")).to(tl.float32)
        most_s, most_t, sum_s, sum_t, apart = add_logits(s, t, most_s, most_t, sum_s, sum_t, apart)
    write_row(value, logs, row, rows, most_s, most_t, sum_s, sum_t, apart)


@launched(do_not_specialize=["rows"])
def _forward_kl_grad(student, teacher, logs, grad, to_student, rows, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = token < vocabulary
    s = tl.load(student + row * vocabulary + token, mask=here, other=0.0).to(tl.float32)
    t = tl.load(teacher + row * vocabulary + token, mask=here, other=0.0).to(tl.float32)
    slope = tl.exp(s - tl.load(logs + row)) - tl.exp(t - tl.load(logs + rows + row))
    slope *= tl.load(grad + row).to(tl.float32)
    tl.store(to_student + row * vocabulary + token, slope.to(to_student.dtype.element_ty), mask=here)


def forward_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.forward_kl` in Triton."""
    student, teacher = student.contiguous(), teacher.contiguous()
    rows, vocabulary = student.shape
    value, logs = student.new_empty(rows, dtype=torch.float32), student.new_empty(2, rows, dtype=torch.float32)
    if rows:
        block = min(4096, triton.next_power_of_2(vocabulary))
        _forward_kl[(rows,)](student, teacher, value, logs, rows, vocabulary, BLOCK=block, num_warps=8)
    return value, logs


def forward_kl_grad(student: Tensor, teacher: Tensor, logs: Tensor, grad: Tensor) -> Tensor:
    """`ops.forward_kl_grad` in Triton."""
    student, teacher, logs, grad = (x.contiguous() for x in (student, teacher, logs, grad))
    rows, vocabulary = student.shape
    out, block = torch.empty_like(student), min(4096, triton.next_power_of_2(vocabulary))
    if rows:
        _forward_kl_grad[(rows, triton.cdiv(vocabulary, block))](
            student, teacher, logs, grad, out, rows, vocabulary, BLOCK=block, num_warps=8
        )
    return out
