"""Matrix-vector products that read only what is selected, as torch operators: on CPUs a small C library where a
compiler is present (see cpu/kernels.c), on GPUs Triton's kernels (see triton/), torch's own operators elsewhere.

They are operators so that torch's FlopCounterMode sees them and torch.compile leaves them whole. None has a gradient.
The numbers of what was read are on the inputs' device, and only torch's own operators wait for it, once a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import flop_registry, register_flop_formula

from students.kernels import triton
from students.kernels.cpu import toolchain
from students.kernels.triton import tuning


def observed() -> bool:
    """Whether somebody counts operations or compiles them, and has to see torch's own."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _layers(
    limit: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, ends: list[int]
) -> tuple[Any, ...]:
    """Linear layers side by side, as the C functions that read channels take them between input and output."""
    rank = 0 if up is None else len(up)
    return (
        *(limit.data_ptr(), weight.data_ptr(), weight.stride(0), *weight.shape, _address(bias), _address(down)),
        *(_address(up), rank, (ctypes.c_int64 * len(ends))(*ends), len(ends)),
    )


_operators = torch.library.Library("elastic", "DEF")


def operator(schema: str, fake: Any) -> Any:
    def register(function: Any) -> Any:
        name = _operators.define(schema)
        _operators.impl(name, function, "CompositeExplicitAutograd")
        if name in triton.OPERATORS and triton.available():
            _operators.impl(name, triton.implementation(name), "CUDA")
        torch.library.register_fake(f"elastic::{name}", fake, lib=_operators)
        return getattr(torch.ops.elastic, name).default

    return register


def _read_channels(
    x: Tensor,
    limit: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    ends: list[int],
) -> tuple[Tensor, Tensor]:
    kind = toolchain.native(x)
    if kind is not None:
        x, out = x.contiguous(), x.new_empty(weight.shape[1])
        layers = _layers(limit, weight, bias, down, up, ends)
        count = getattr(toolchain.loaded, f"read_channels_{kind}")(
            x.data_ptr(), *layers, out.data_ptr(), torch.get_num_threads()
        )
        return out, torch.tensor(count)
    rows = (x.abs() >= limit).nonzero().squeeze(1)
    bag = rows.unsqueeze(0)
    if len(rows):
        out = F.embedding_bag(bag, weight, mode="sum", per_sample_weights=x[bag]).squeeze(0)
    else:
        out = x.new_zeros(weight.shape[1])
    if bias is not None:
        out = out + bias
    if up is not None:
        low = F.linear(x, down).view(len(ends), -1)
        starts = [0, *ends[:-1]]
        out = out + torch.cat([low[p] @ up[:, a:b] for p, (a, b) in enumerate(zip(starts, ends, strict=True))])
    return out, torch.tensor(len(rows), device=x.device)


read_channels = operator(
    "read_channels(Tensor x, Tensor limit, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, int[] ends)"
    " -> (Tensor, Tensor)",
    lambda x, limit, weight, *_: (x.new_empty(weight.shape[1]), x.new_empty((), dtype=torch.long)),
)(_read_channels)
"""Several linear layers that read one input x [I], side by side, from the channels with |x| >= limit [I] (float32).

weight [I, O], contiguous rows; bias [O]; low-rank corrections, which read every channel: down [parts * r, I], up
[r, O]; ends: where the outputs of each layer end. Returns out [O] and the number of channels read.
"""


def _dot_rows(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
    kind = toolchain.native(x)
    if kind is not None:
        x = x.contiguous()
        out = x.new_empty(len(weight) if rows is None else len(rows))
        getattr(toolchain.loaded, f"dot_rows_{kind}")(
            *(x.data_ptr(), weight.data_ptr(), _address(bias), _address(rows), len(out), len(x), out.data_ptr()),
            torch.get_num_threads(),
        )
        return out
    if rows is None:
        return F.linear(x, weight, bias)
    return F.linear(x, weight[rows], None if bias is None else bias[rows])


dot_rows = operator(
    "dot_rows(Tensor x, Tensor weight, Tensor? bias, Tensor? rows) -> Tensor",
    lambda x, weight, bias, rows: x.new_empty(len(weight) if rows is None else len(rows)),
)(_dot_rows)
"""A linear layer, weight [O, I] contiguous, of which some outputs are wanted, rows [n] (None: all): x [I] -> [n]."""


def _exact_rows(
    x: Tensor, head: Tensor, bias: Tensor | None, preview: Tensor, limit: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor]:
    kind = toolchain.native(x)
    if kind is not None:
        x, limit = x.contiguous(), limit.float().contiguous()
        out, count = torch.empty_like(preview), torch.empty(len(x), dtype=torch.long)
        getattr(toolchain.loaded, f"exact_rows_{kind}")(
            *(x.data_ptr(), len(x), head.data_ptr(), _address(bias), len(head), x.shape[1], preview.data_ptr()),
            *(limit.data_ptr(), float(tail), out.data_ptr(), count.data_ptr(), torch.get_num_threads()),
        )
        return out, count
    needed = preview >= limit.unsqueeze(1)
    rows = needed.any(0).nonzero().squeeze(1)
    exact = F.linear(x, head[rows], None if bias is None else bias[rows])
    guess = preview + tail
    return guess.index_copy(1, rows, torch.where(needed[:, rows], exact, guess[:, rows])), needed.sum(1)


exact_rows = operator(
    "exact_rows(Tensor x, Tensor head, Tensor? bias, Tensor preview, Tensor limit, Tensor tail) -> (Tensor, Tensor)",
    lambda x, head, bias, preview, *_: (torch.empty_like(preview), x.new_empty(len(x), dtype=torch.long)),
)(_exact_rows)
"""The LM head, head [V, D] contiguous, for hidden states x [B, D]: exact where the preview [B, V] reaches the limit
[B], preview + tail [] elsewhere. Returns logits [B, V] and the numbers of exact rows [B]."""


def exact_together(x: Tensor) -> int:
    """For how many inputs at once `exact_rows` is faster than the whole head on the device of x: each of them needs few
    rows, and on GPUs reading these is nearly all that it costs."""
    return tuning.MOST_ROWS if x.is_cuda and triton.available() else 4


def reads_few(weight: Tensor, ends: list[int]) -> bool:
    """Whether `few_channels` runs here: on a GPU with Triton, or in bfloat16 on a CPU with products of it, and outputs
    in multiples of 32."""
    if weight.is_cuda:
        return triton.available()
    return (
        toolchain.native(weight) == "bf16"
        and hasattr(toolchain.loaded, "few_channels_bf16")
        and not any(end % 32 for end in ends)
    )


def _few_channels(
    x: Tensor,
    limit: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    ends: list[int],
) -> tuple[Tensor, Tensor]:
    if not weight.is_cuda and reads_few(weight, ends):
        x, out = x.contiguous(), x.new_empty(len(x), weight.shape[1])
        layers, threads = _layers(limit, weight, bias, down, up, ends), torch.get_num_threads()
        count = toolchain.loaded.few_channels_bf16(x.data_ptr(), len(x), *layers, out.data_ptr(), threads)
        return out, torch.tensor(count)
    needed = x.abs() >= limit
    rows = needed.any(0).nonzero().squeeze(1)
    out = (x * needed)[:, rows] @ weight[rows]
    if bias is not None:
        out = out + bias
    if up is not None:
        sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        low = F.linear(x, down).chunk(len(ends), 1)
        out = out + torch.cat([part @ to for part, to in zip(low, up.split(sizes, 1), strict=True)], 1)
    return out, torch.tensor(len(rows), device=x.device)


few_channels = operator(
    "few_channels(Tensor x, Tensor limit, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, int[] ends)"
    " -> (Tensor, Tensor)",
    lambda x, limit, weight, *_: (x.new_empty(len(x), weight.shape[1]), x.new_empty((), dtype=torch.long)),
)(_few_channels)
"""As `read_channels`, for a few inputs x [B, I] at once: channels that any of them needs are read, once for all."""


def reader(limit: Tensor, weight: Tensor, *rest: Any) -> Callable[[Tensor], tuple[Tensor, int | Tensor]]:
    """`read_channels` for one set of weights and many inputs x [I]: what the C function is told is put together once.

    The operator itself is called where somebody counts or compiles, and where there is no C library.
    """
    outputs, dtype = weight.shape[1], weight.dtype
    function = getattr(toolchain.loaded, f"read_channels_{toolchain.native(weight)}", None)
    layers = _layers(limit, weight, *rest)

    def read(x: Tensor) -> tuple[Tensor, int | Tensor]:
        if function is None or x.dtype != dtype or observed():
            return read_channels(x.flatten(), limit, weight, *rest)
        x, out = x.contiguous(), torch.empty(outputs, dtype=dtype)
        return out, function(x.data_ptr(), *layers, out.data_ptr(), torch.get_num_threads())

    return read


@register_flop_formula(torch.ops.elastic.read_channels, get_raw=True)
def _read_channels_flops(x: Tensor, limit: Tensor, weight: Tensor, *rest: Any, out_val: tuple[Tensor, Tensor]) -> int:
    _, down, up, _ = rest
    corrections = 0 if up is None else down.numel() + up.numel()
    return 2 * (int(out_val[1]) * weight.shape[1] + corrections)


@register_flop_formula(torch.ops.elastic.dot_rows, get_raw=True)
def _dot_rows_flops(x: Tensor, *rest: Any, out_val: Tensor) -> int:
    return 2 * len(x) * len(out_val)


@register_flop_formula(torch.ops.elastic.exact_rows, get_raw=True)
def _exact_rows_flops(x: Tensor, *rest: Any, out_val: tuple[Tensor, Tensor]) -> int:
    return 2 * int(out_val[1].sum()) * x.shape[1]


@register_flop_formula(torch.ops.elastic.few_channels, get_raw=True)
def _few_channels_flops(x: Tensor, *rest: Any, out_val: tuple[Tensor, Tensor]) -> int:
    return len(x) * _read_channels_flops(x, *rest, out_val=out_val)


def _mv_flops(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
    rows, columns = shapes[-2]  # mv(matrix, vector), addmv(start, matrix, vector)
    return 2 * rows * columns


for _product in (torch.ops.aten.mv, torch.ops.aten.addmv):
    if _product not in flop_registry:  # torch counts products with matrices only
        register_flop_formula(_product)(_mv_flops)
