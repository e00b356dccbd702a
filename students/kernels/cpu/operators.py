"""The operators on CPUs: calls of the C library. Where there is no library, or it does not support a tensor's dtype,
the reference runs. Arguments and results are explained in ../ops.py."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from students.kernels import reference
from students.kernels.cpu import toolchain
from students.kernels.merging import NOT_NOW, must_leave_pairs

OPERATORS: dict[str, Callable[..., Any]] = {}
"""By operator name, the function that torch's dispatcher calls for tensors on a CPU."""


def _in_c(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function as the CPU's operator of the same name, with the reference in its place for tensors that the
    C library does not support."""
    other = getattr(reference, function.__name__)

    def run(first: Tensor, *rest: Any) -> Any:
        return (other if toolchain.native(first) is None else function)(first, *rest)

    OPERATORS[function.__name__] = run
    return function


def layers(
    limit: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, ends: list[int]
) -> tuple[Any, ...]:
    """Return the arguments between input and output of the C functions that read channels, for layers side by side."""
    rank, where = 0 if up is None else len(up), (ctypes.c_int64 * len(ends))(*ends)
    return limit, weight.data_ptr(), weight.stride(0), *weight.shape, bias, down, up, rank, where, len(ends)


@_in_c
def read_channels(x: Tensor, limit: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = x.new_empty(weight.shape[1])
    return out, torch.tensor(toolchain.call("read_channels", x, *layers(limit, weight, *rest), out))


def reads_few(weight: Tensor, ends: Sequence[int]) -> bool:
    """Return whether there is a C function of `few_channels` for this weight: in bfloat16 if the CPU has bfloat16
    products, and if the ends of all layers are multiples of 32."""
    return (
        toolchain.native(weight) == "bf16"
        and hasattr(toolchain.loaded, "few_channels_bf16")
        and not any(end % 32 for end in ends)
    )


@_in_c
def few_channels(x: Tensor, limit: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if not reads_few(weight, rest[-1]):
        return reference.few_channels(x, limit, weight, *rest)
    out = x.new_empty(len(x), weight.shape[1])
    return out, torch.tensor(toolchain.call("few_channels", x, len(x), *layers(limit, weight, *rest), out))


@_in_c
def dot_rows(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
    out = x.new_empty(len(weight) if rows is None else len(rows))
    toolchain.call("dot_rows", x, weight, bias, rows, len(out), len(x), out)
    return out


FEW_PRODUCTS = 1 << 19
"""Multiply-accumulates up to which a thin product is faster in C than in torch, which takes tens of microseconds for
any."""


@_in_c
def thin_product(x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    count = len(x) if rows is None else len(rows)
    if count * weight.numel() > FEW_PRODUCTS:
        return reference.thin_product(x, rows, weight, bias)
    out = x.new_empty(count, len(weight))
    toolchain.call("thin_product", x, rows, count, x.shape[1], weight, bias, len(weight), out)
    return out


@_in_c
def open_tokens(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias, up, shift, position, prefix = rest
    low = thin_product(x.flatten(0, -2), None, weight, bias)
    out = torch.empty(x.shape[:-1], dtype=torch.bool)
    order, place = (torch.empty(len(low), dtype=torch.long) for _ in range(2))
    position = None if position is None else position.expand(out.shape)
    given = low, len(low), up, len(weight) - 1, shift, position, prefix, out, order, place
    return out, order, place, torch.tensor(toolchain.call("open_tokens", *given))


@_in_c
def exact_rows(
    x: Tensor, head: Tensor, bias: Tensor | None, preview: Tensor, limit: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor]:
    out, count = preview.new_empty(preview.shape), torch.empty(len(x), dtype=torch.long)
    given = x, len(x), head, bias, *head.shape, preview, limit.float(), tail.float()
    toolchain.call("exact_rows", *given, out, count)
    return out, count


@_in_c
def channel_gate(x: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    out, share = x.new_empty(x.shape), torch.empty(x.shape[:-1], dtype=torch.float32)
    toolchain.call("channel_gate", x, share.numel(), x.shape[-1], limit, _each(x, limit), out, share)
    return out, share


def _each(x: Tensor, limit: Tensor) -> int:
    """Return how many rows of x [..., C] share a row of limit [C] or [B, 1, C]."""
    return max(1, x.numel() // max(1, limit.numel()))


@_in_c
def channel_gate_grad(grad_out: Tensor, grad_share: Tensor, x: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    grads = x.new_empty(x.shape), limit.new_zeros(limit.shape)
    shape = grad_share.numel(), x.shape[-1]
    toolchain.call("channel_gate_grad", grad_out, x, *shape, limit, _each(x, limit), grad_share, *grads)
    return grads


@_in_c
def gated_grad(
    grad_out: Tensor, grad_share: Tensor, gate: Tensor, up: Tensor, limit: Tensor, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = gate.new_empty(gate.shape), up.new_empty(up.shape), limit.new_zeros(limit.shape)
    shape = grad_share.numel(), gate.shape[-1]
    toolchain.call("gated_grad", grad_out, gate, up, *shape, limit, _each(gate, limit), grad_share, kind, *grads)
    return grads


@_in_c
def row_gate(exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    out, share = exact.new_empty(exact.shape), torch.empty(exact.shape[:-1], dtype=torch.float32)
    added = float(tail.to(exact.dtype))
    toolchain.call("row_gate", exact, preview, share.numel(), exact.shape[-1], limit, added, out, share)
    return out, share


@_in_c
def row_gate_grad(
    grad_out: Tensor, grad_share: Tensor, exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [x.new_empty(x.shape) for x in (exact, preview, limit, limit)]
    shape, settings = (grad_share.numel(), exact.shape[-1]), (limit, float(tail.to(exact.dtype)), grad_share)
    toolchain.call("row_gate_grad", grad_out, exact, preview, *shape, *settings, *grads)
    return grads[0], grads[1], grads[2], grads[3].sum()


@_in_c
def forward_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    value, logs = (torch.empty(*shape, len(student), dtype=torch.float32) for shape in ((), (2,)))
    toolchain.call("forward_kl", student, teacher, *student.shape, value, logs)
    return value, logs


@_in_c
def forward_kl_grad(student: Tensor, teacher: Tensor, logs: Tensor, grad: Tensor) -> Tensor:
    out = student.new_empty(student.shape)
    toolchain.call("forward_kl_grad", student, teacher, *student.shape, logs, grad, out)
    return out


@_in_c
def routed_kl(
    exact: Tensor, preview: Tensor, teacher: Tensor, limit: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    value, share, logs = (torch.empty(*shape, len(exact), dtype=torch.float32) for shape in ((), (), (2,)))
    added = float(tail.to(exact.dtype))
    toolchain.call("routed_kl", exact, preview, teacher, *exact.shape, limit, added, value, share, logs)
    return value, share, logs


@_in_c
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
    grads = limit.new_empty(limit.shape), limit.new_empty(limit.shape)
    given = exact, preview, teacher, *exact.shape, limit, float(tail.to(exact.dtype)), logs, grad, grad_share
    toolchain.call("routed_kl_grad", *given, *grads)
    return grads[0], grads[1].sum()


@_in_c
def softmax_grad(score: Tensor, grad: Tensor, tokens: int) -> None:
    keys = score.shape[-1]
    toolchain.call("softmax_grad", score, grad, score.numel() // keys, keys, tokens)


@_in_c
def rms_norm(x: Tensor, weight: Tensor, epsilon: float, kind: int) -> Tensor:
    out, width = x.new_empty(x.shape), x.shape[-1]
    toolchain.call("rms_norm", x, x.numel() // width, width, weight, epsilon, kind, out)
    return out


@_in_c
def rms_norm_grad(grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, kind: int) -> Tensor:
    out, gain = x.new_empty(x.shape), weight.float() + (kind == 2)
    toolchain.call("rms_norm_grad", grad, x, x.numel() // len(gain), len(gain), gain, epsilon, out)
    return out


FEW_NUMBERS = 1 << 14
"""Minimum numbers in all keys: with fewer, torch's attention is as fast as a call of the C function."""


def attends_to_cache(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether there is a C function of `decode_attention` for these tensors that is faster than torch's."""
    return keys.numel() >= FEW_NUMBERS and _attends_in_c(query, keys, values)


def _attends_in_c(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether there is a C function of `decode_attention` for these tensors: in bfloat16 if the CPU has bfloat16
    products, for heads of multiples of 32 channels, of which at most 32 share a key head."""
    return (
        toolchain.native(query) == "bf16"
        and hasattr(toolchain.loaded, "decode_attention_bf16")
        and query.dtype == keys.dtype == values.dtype
        and not keys.shape[3] % 32
        and not values.shape[3] % 32
        and query.shape[1] <= 32 * keys.shape[1]
    )


@_in_c
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
    if not _attends_in_c(query, keys, values):
        return reference.decode_attention(query, keys, values, mask, slot, scale, window, cap)
    batch, groups, slots, size = keys.shape
    each, width, threads = query.shape[1] // groups, values.shape[3], torch.get_num_threads()
    ranges = max(1, min(4 * threads // (batch * groups), slots // 64))
    partial = torch.empty(batch * groups * ranges, each, width + 2, dtype=torch.float32)
    out = query.new_empty(batch, 1, query.shape[1], width)
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)
    given = query, keys, values, batch, groups, each, slots, size, width
    rows = 0 if mask is None or len(mask) == 1 else slots
    hidden = mask, int(mask is not None and mask.dtype == torch.bool), rows
    toolchain.call("decode_attention", *given, *hidden, slot, window, scale, cap, ranges, partial, out)
    return out


@_in_c
def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    each = 0 if len(cos) == 1 else cos.shape[1] * cos.shape[2]
    return _turned(query, cos, sin, each), _turned(key, cos, sin, each)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, each: int) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(x.transpose(1, 2).shape)
    toolchain.call("rotary", out, x.data_ptr(), *x.shape, *x.stride()[:3], cos, sin, cos.shape[-1], each)
    return out.transpose(1, 2)


@_in_c
def write_slot(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot: Tensor) -> None:
    rows, slots = keys.shape[0] * keys.shape[1], keys.shape[2]
    toolchain.call("write_slot", keys, values, key, value, rows, slots, keys.shape[3], values.shape[3], slot)


@_in_c
def merge_lowest(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *given, top, keep = rest
    must_leave_pairs(x.shape[1], len(top), keep)
    return _merge("merge_lowest", x, (*given, top), (len(top), keep), keep)


@_in_c
def merge_below(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *given, top, lengths, shift, multiple = rest
    scalars = len(top), lengths, shift, multiple
    counts = torch.empty(len(x), dtype=torch.long)
    return _merge("merge_below", x, (*given, top), scalars, x.shape[1], counts)


def _merge(
    name: str, x: Tensor, given: Sequence[Tensor | None], scalars: Sequence[Tensor | int], length: int, *more: Tensor
) -> tuple[Tensor, ...]:
    """Call a C function that merges tokens x [B, n, D]. Return tokens, sizes, scores and old indices, `length` for each
    image, the index [B, n] of the token that each old token is now part of, and the tensors `more`, filled as well."""
    batch, n, width = x.shape
    out = x.new_empty(batch, length, width)
    sizes, scores = (torch.empty(batch, length, dtype=torch.float32) for _ in range(2))
    index, into = (torch.empty(batch, count, dtype=torch.long) for count in (length, n))
    found = out, sizes, scores, index, into, *more
    toolchain.call(name, x, *x.shape, *given, NOT_NOW, *scalars, *found)
    return found
