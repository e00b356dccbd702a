"""Gates and divergences of a training step in one pass over what they read: on CPUs fused.c where a C compiler is
present (see toolchain.build), on GPUs Triton's kernels (see triton/), torch's own operators elsewhere, at the same
values.

None has a gradient of its own; the ones with `grad` in their names are the gradients of the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from students.kernels import ops, triton
from students.kernels.cpu import toolchain


def _reaches(x: Tensor, limit: Tensor) -> Tensor:
    """1 where x >= limit, else 0, in x's dtype: on CPUs faster than a boolean, and so are products with it."""
    return torch.ge(x, limit.to(x.dtype), out=torch.empty_like(x))


def _channel_gate(x: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    if toolchain.native(x) is None:
        keep = _reaches(x.abs(), limit)
        return x * keep, keep.mean(-1, dtype=torch.float32)
    x, limit = x.contiguous(), limit.contiguous()
    out, share = torch.empty_like(x), torch.empty(x.shape[:-1])
    toolchain.call("channel_gate", x, share.numel(), x.shape[-1], limit, _each(x, limit), out, share)
    return out, share


def _each(x: Tensor, limit: Tensor) -> int:
    """How many rows of x [..., C] share a row of limit [C] or [B, 1, C]."""
    return max(1, x.numel() // limit.numel())


channel_gate = ops.operator(
    "channel_gate(Tensor x, Tensor limit) -> (Tensor, Tensor)",
    lambda x, limit: (torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)),
)(_channel_gate)
"""x [..., C] with 0 where |x| < limit, which is float32 [C], or [B, 1, C] for x [B, T, C]; the share kept [...]."""


def masker(limit: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The first output of `channel_gate` for one limit [C] and many inputs: what the C function is told is put together
    once. The operator itself is called where somebody counts or compiles, and where there is no C library."""
    probe, size, place = torch.empty(0, dtype=dtype, device=limit.device), len(limit), limit.data_ptr()
    native = toolchain.native(probe) is not None
    function = toolchain.function("channel_gate", probe, 0, 0, limit, 0, probe, None) if native else None

    def mask(x: Tensor) -> Tensor:
        if function is None or x.dtype != dtype or ops.observed():
            return channel_gate(x, limit)[0]
        x = x.contiguous()
        out, rows = torch.empty_like(x), x.numel() // size
        function(x.data_ptr(), rows, size, place, rows, out.data_ptr(), None, torch.get_num_threads())
        return out

    return mask


def _channel_gate_grad(
    grad_out: Tensor, grad_share: Tensor, x: Tensor, limit: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    if toolchain.native(x) is not None:
        x, grad_out, grad_share = x.contiguous(), grad_out.contiguous(), grad_share.contiguous()
        limit, low, high = limit.contiguous(), low.contiguous(), high.contiguous()
        grad_x, grad_limit = torch.empty_like(x), torch.zeros_like(limit)
        limits = limit, low, high, _each(x, limit)
        toolchain.call(
            "channel_gate_grad", grad_out, x, grad_share.numel(), x.shape[-1], *limits, grad_share, grad_x, grad_limit
        )
        return grad_x, grad_limit
    size = x.abs()
    near = _reaches(size, low) - _reaches(size, high)
    slope = _sum_tokens(None, (grad_out * x).mul_(near), limit.shape)
    slope += _sum_tokens(grad_share, near, limit.shape) / x.shape[-1]
    return grad_out * _reaches(size, limit), -slope


def _sum_tokens(weight: Tensor | None, x: Tensor, shape: torch.Size) -> Tensor:
    """sum_n weight[n] x[n, C] as a matrix product, over all tokens (shape [C]) or those of each row ([B, 1, C]).

    x [..., C], weight [...]; None: all ones.
    """
    weight = x.new_ones(x.shape[:-1]) if weight is None else weight.to(x.dtype)
    if len(shape) == 1:
        x, weight = x.flatten(0, -2), weight.flatten()
    return (weight.unsqueeze(-2) @ x).float().view(shape)


channel_gate_grad = ops.operator(
    "channel_gate_grad(Tensor grad_out, Tensor grad_share, Tensor x, Tensor limit, Tensor low, Tensor high)"
    " -> (Tensor, Tensor)",
    lambda grad_out, grad_share, x, limit, *_: (torch.empty_like(x), torch.empty_like(limit)),
)(_channel_gate_grad)
"""Gradients of `channel_gate` by x and log(limit), the latter from the channels with low <= |x| < high."""


def _row_gate(exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    if toolchain.native(exact) is None:
        keep = _reaches(preview, limit)
        guess = preview + tail.to(preview.dtype)
        # both products are exact, and one of them is zero
        return torch.addcmul(guess * (1 - keep), exact, keep), keep.mean(-1, dtype=torch.float32)
    exact, preview, limit = exact.contiguous(), preview.contiguous(), limit.contiguous()
    out, share = torch.empty_like(exact), torch.empty(exact.shape[:-1])
    added = float(tail.to(exact.dtype))
    toolchain.call("row_gate", exact, preview, share.numel(), exact.shape[-1], limit, added, out, share)
    return out, share


row_gate = ops.operator(
    "row_gate(Tensor exact, Tensor preview, Tensor limit, Tensor tail) -> (Tensor, Tensor)",
    lambda exact, *_: (torch.empty_like(exact), exact.new_empty(exact.shape[:-1], dtype=torch.float32)),
)(_row_gate)
"""exact [..., V] where preview >= limit [..., 1], float32, else preview + tail []; the share of exact ones [...]."""


def _row_gate_grad(
    grad_out: Tensor, grad_share: Tensor, exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if toolchain.native(exact) is not None:
        exact, preview, limit = exact.contiguous(), preview.contiguous(), limit.contiguous()
        grad_out, grad_share = grad_out.contiguous(), grad_share.contiguous()
        grad_exact, grad_preview = torch.empty_like(exact), torch.empty_like(preview)
        grad_limit, grad_tail = torch.empty_like(limit), torch.empty_like(limit)
        shape, settings = (grad_share.numel(), exact.shape[-1]), (limit, float(tail.to(exact.dtype)), grad_share)
        grads = grad_exact, grad_preview, grad_limit, grad_tail
        toolchain.call("row_gate_grad", grad_out, exact, preview, *shape, *settings, *grads)
        return grad_exact, grad_preview, grad_limit, grad_tail.sum()
    grad_exact = grad_out * _reaches(preview, limit)
    near = _reaches(preview, limit - 0.5) - _reaches(preview, limit + 0.5)
    guess = preview + tail.to(preview.dtype)
    grad_limit = -((exact - guess).mul_(grad_out).mul_(near)).sum(-1, keepdim=True, dtype=torch.float32)
    grad_limit -= grad_share.unsqueeze(-1) * near.mean(-1, keepdim=True, dtype=torch.float32)
    grad_tail = grad_out.sum(dtype=torch.float32) - grad_exact.sum(dtype=torch.float32)
    return grad_exact, grad_out - grad_exact, grad_limit, grad_tail


row_gate_grad = ops.operator(
    "row_gate_grad(Tensor grad_out, Tensor grad_share, Tensor exact, Tensor preview, Tensor limit, Tensor tail)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_out, grad_share, exact, preview, limit, tail: tuple(
        torch.empty_like(x) for x in (exact, preview, limit, tail)
    ),
)(_row_gate_grad)
"""Gradients of `row_gate` by exact, preview, limit (from the rows within half a nat of it) and tail."""


def _forward_kl_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student, teacher = student.contiguous(), teacher.contiguous()
    if toolchain.native(student) is not None:
        value, logs = torch.empty(len(student)), torch.empty(2, len(student))
        toolchain.call("forward_kl", student, teacher, *student.shape, value, logs)
        return value, logs
    s, t = student.float(), teacher.float()
    logs = torch.stack([s.logsumexp(1), t.logsumexp(1)])
    return torch.linalg.vecdot((t - logs[1, :, None]).exp(), t - s) - (logs[1] - logs[0]), logs


forward_kl_rows = ops.operator(
    "forward_kl(Tensor student, Tensor teacher) -> (Tensor, Tensor)",
    lambda student, _: tuple(student.new_empty(*n, len(student), dtype=torch.float32) for n in ((), (2,))),
)(_forward_kl_rows)
"""KL(teacher || student) [N] of logits [N, V] in nats, and the logarithms of each row's sum of exponentials [2, N]."""


def _forward_kl_grad(student: Tensor, teacher: Tensor, logs: Tensor, grad: Tensor) -> Tensor:
    if toolchain.native(student) is not None:
        student, teacher = student.contiguous(), teacher.contiguous()
        out = torch.empty_like(student)
        toolchain.call("forward_kl_grad", student, teacher, *student.shape, logs, grad.contiguous(), out)
        return out
    q, p = ((x.float() - log.unsqueeze(1)).exp_() for x, log in zip((student, teacher), logs, strict=True))
    return q.sub_(p).mul_(grad.unsqueeze(1)).to(student.dtype)


forward_kl_grad = ops.operator(
    "forward_kl_grad(Tensor student, Tensor teacher, Tensor logs, Tensor grad) -> Tensor",
    lambda student, *_: torch.empty_like(student),
)(_forward_kl_grad)
"""The gradient of `forward_kl_rows` by the student's logits, for the gradient [N] by the divergences."""


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        value, logs = forward_kl_rows(student, teacher)
        ctx.save_for_backward(student, teacher, logs)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return forward_kl_grad(*ctx.saved_tensors, grad), None


def reads_once(logits: Tensor) -> bool:
    """Whether `forward_kl` makes no copy of these logits in float32."""
    on_gpu = logits.is_cuda and logits.dtype != torch.float64 and triton.available()
    return on_gpu or toolchain.native(logits) is not None


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) [N] of logits [N, V] in nats, for those that it `reads_once`; the teacher's are fixed."""
    return _ForwardKL.apply(student, teacher)
