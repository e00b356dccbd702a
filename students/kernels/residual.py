"""Residual streams of image models on a GPU, where a sum and the layer norm that reads it next are one launch.

A block adds the output of each of its branches to the residual stream and then applies a layer norm to the sum. Apart,
these are two launches, of which the second reads again what the first has written. Blocks are given a Residual instead
of a plain tensor: its sum with a branch's output is deferred until a layer norm asks for it, or anything else does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.kernels import devices, ops
from students.kernels.deferred import ADD, Deferred, alike


class Residual(Tensor):
    """Tokens [B, n, D] whose sum with a tensor like them is a ResidualSum.

    They may carry their layer norm `normed` with one `weight`, which F.layer_norm with that weight then returns. For
    every other function they are an ordinary tensor.
    """

    weight: Tensor
    normed: Tensor

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.layer_norm and kwargs.get("weight") is getattr(args[0], "weight", args):
                return args[0].normed
            if function in ADD and not kwargs and isinstance(args[0], Tensor) and alike(*args) and _defers(args[0]):
                return ResidualSum(args[0].shape, args[0], *args)
            return function(*args, **kwargs)


class ResidualSum(Deferred):
    """A deferred sum of two tensors [B, n, D]: a layer norm of it is computed in the launch that adds them."""

    def __init__(self, shape: torch.Size, like: Tensor, *terms: Tensor) -> None:
        self.terms = [*terms]  # emptied when the sum is made
        super().__init__(shape, like, partial(_sum, self.terms))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.layer_norm and args[0].made is None and _fits(args[0], kwargs["weight"]) and _defers(args[0]):
            return args[0].normed(kwargs["weight"], kwargs["bias"], kwargs["eps"])
        return super().__torch_function__(func, types, args, kwargs)

    def normed(self, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
        """Return the layer norm of the sum, and keep the sum."""
        with torch._C.DisableTorchFunctionSubclass():
            normed, total = ops.sum_norm(*self.terms, weight, bias, epsilon)
        self.made = total.as_subclass(Residual)
        self.terms.clear()
        return normed


def _sum(terms: list[Tensor]) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        total = torch.add(*terms)
    terms.clear()
    return total.as_subclass(Residual)


def _fits(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernels apply a layer norm with this weight to x [..., D]."""
    return weight is not None and weight.dtype == x.dtype and weight.shape == x.shape[-1:]


def _defers(x: Tensor) -> bool:
    """Whether kernels run on the device of x, without gradients, and launches are dear there."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return devices.runs_ahead(x.device) and ops.compiled(x)


def residual_of(x: Tensor) -> Tensor:
    """Return x [B, n, D], the input of a block that runs without gradients, as a Residual where that saves launches."""
    return x.as_subclass(Residual) if type(x) is Tensor and _defers(x) else x


def merge_for(block: nn.Module, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Return `ops.merge_lowest` of tokens x [B, n, D], which the first layer norm of `block` reads next. On a GPU the
    merged tokens are a Residual that carries that layer norm, where the kernel can apply it."""
    norm = next((part for part in block.children() if isinstance(part, nn.LayerNorm)), None)
    if norm is None or not _defers(x) or not _fits(x, norm.weight):
        return ops.merge_lowest(x, *rest)
    normed, tokens, *found = ops.merge_normed(x, *rest, norm.weight, norm.bias, norm.eps)
    tokens = tokens.as_subclass(Residual)
    tokens.weight, tokens.normed = norm.weight, normed
    return tokens, *found
