"""FLOPs counted while a model runs, for any attention kernel: formulas that torch's own counter lacks.

torch's counter knows CUDA's attention kernels only, counts causal attention as full attention, and in many versions
refuses fewer key heads than query heads. It does not count matrix-vector products, products with some rows of a
matrix, and products with packed weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula


def attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], causal: bool = False, backward: bool = False
) -> int:
    """Return the FLOPs of attention with query [B, H, Q, d], key [B, K, C, d] and value [B, K, C, v]; K divides H.

    causal: query i sees the first i + 1 keys, and fused kernels compute no others. backward: count the backward pass,
    which has three products of width d and two of width v; the forward pass has one of each.
    """
    batch, heads, queries, size = query
    keys, value_size = key[2], value[3]
    seen = queries * keys
    if causal:
        growing = min(queries, keys)
        seen = growing * (growing + 1) // 2 + (queries - growing) * keys
    widths = 3 * size + 2 * value_size if backward else size + value_size
    return 2 * batch * heads * seen * widths


def _attention(names: list[str], skips: bool, backward: bool, *args: Any, **kwargs: Any) -> int:
    """Return `attention_flops` of a call (args, kwargs) of an operator whose arguments are called `names`; skips:
    whether the operator, if causal, leaves out the scores that the mask hides."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, value = (tuple(given[name].shape) for name in ("query", "key", "value"))
    return attention_flops(query, key, value, causal=skips and bool(given.get("is_causal")), backward=backward)


_SKIPS = {
    "_scaled_dot_product_flash_attention": True,
    "_scaled_dot_product_efficient_attention": True,
    "_scaled_dot_product_cudnn_attention": True,
    "_scaled_dot_product_fused_attention_overrideable": True,
    "_scaled_dot_product_flash_attention_for_cpu": True,
    "_scaled_dot_product_attention_math_for_mps": False,
}
"""torch's attention operators that are not composed of other operators, and whether they leave out the scores that a
causal mask hides. Each but the last has a `_backward`."""


def _formulas() -> dict[Any, Callable[..., int]]:
    """Return the FLOP formulas of the operators in `_SKIPS`, and of their backward, that this version of torch has."""
    found: dict[Any, Callable[..., int]] = {}
    for name, skips in _SKIPS.items():
        for backward in (False, True):
            operator = getattr(torch.ops.aten, name + "_backward" * backward, None)
            if operator is not None:
                names = [argument.name for argument in operator.default._schema.arguments]
                formula: Any = partial(_attention, names, skips, backward)
                formula._get_raw = True  # the counter then passes tensors, not their shapes
                found[operator] = formula
    return found


ATTENTION = _formulas()
"""FLOP formulas by attention operator."""


def _packed_flops(x: torch.Tensor, packed: torch.Tensor, shape: list[int], *rest: Any, **options: Any) -> int:
    """Return the FLOPs of a product of x [..., I] with a packed weight of shape [O, I]."""
    return 2 * x.numel() * shape[0]


_packed_flops._get_raw = True  # type: ignore[attr-defined]


def _grouped_flops(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, *rest: Any, **options: Any) -> int:
    """Return the FLOPs of products with weight [G, I, O] of the rows of x [N, I] before the last of ends [G]."""
    return 2 * int(ends[-1]) * weight.shape[1] * weight.shape[2]


_grouped_flops._get_raw = True  # type: ignore[attr-defined]


def grouped_bytes(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, *rest: Any) -> int:
    """Return the bytes that such products read: x, and the matrices of weight [G, I, O] that have rows of x."""
    used = int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum())
    return x.nbytes + used * weight[0].nbytes


def other_products() -> dict[Any, Callable[..., int]]:
    """Return FLOP formulas of products with some rows of a matrix (kernels/first_rows.py) and, if bitsandbytes has been
    imported, with its packed weights."""
    known: dict[Any, Callable[..., int]] = {torch.ops.aten._grouped_mm: _grouped_flops}
    found = getattr(torch.ops.bitsandbytes, "gemm_4bit", None)
    return known if found is None else known | {found: _packed_flops}


def _mv_flops(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
    rows, columns = shapes[-2]  # the matrix, in mv(matrix, vector) and addmv(start, matrix, vector)
    return int(2 * rows * columns)


for _product in (torch.ops.aten.mv, torch.ops.aten.addmv):
    if _product not in flop_registry:  # torch itself counts products of two matrices only
        register_flop_formula(_product)(_mv_flops)


def flop_counter() -> FlopCounterMode:
    """Return torch's counter with the formulas above: a context manager that counts the operators run within it."""
    return FlopCounterMode(display=False, custom_mapping={**ATTENTION, **other_products()})
