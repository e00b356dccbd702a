"""RMS norms (arXiv 1910.07467) in one pass: on CPUs with a C compiler forward by norms.c and backward by fused.c, on
GPUs with Triton by triton/rms_norm.py.

Written in Python, as transformers has them, they are eight operators in float32 and leave a dozen behind for backward.
The forward pass has the same bits: it is used only for norms for which a trial shows that. On a GPU where no order of
sums gives them, what differs by rounding is used while routers skip or learn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from students.kernels import ops, triton
from students.kernels.cpu import toolchain
from students.kernels.stand_in import exchange, stand_in


def fuse_norms(model: nn.Module) -> None:
    """Let the frozen RMS norms in a model run in one pass; they are found by the name of their class.

    Each is replaced by a FusedNorm. Those of one class, width and epsilon share a trial.
    """
    trials: dict[tuple[Any, ...], Trial] = {}
    found: dict[nn.Module, nn.Module] = {}
    for norm in model.modules():
        weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if type(norm).__name__.endswith("RMSNorm") and weight is not None and epsilon is not None:
            found[norm] = FusedNorm(norm, trials.setdefault((type(norm), weight.shape, epsilon), Trial(epsilon)))
    exchange(model, found)


class Routing(Protocol):
    """What a norm asks of the student that it is in (see students/execution/runtime.py)."""

    @property
    def rounds(self) -> bool:
        """Whether this call need not be the teacher's bit for bit, whatever its routers choose."""
        ...


def let_round(part: nn.Module, routing: Routing) -> None:
    """Let the fused norms in a part of a model differ from its own by rounding where the whole may."""
    for norm in part.modules():
        if isinstance(norm, FusedNorm):
            norm.routing = routing


class FusedNorm(nn.Module):
    """In place of a norm, with its parameters: x [..., D] -> [..., D].

    The norm's own forward runs where there is no kernel, where its weight learns, where somebody counts operations or
    compiles them, and where it computes something else than the kernels know.
    """

    plain: nn.Module

    def __init__(self, plain: nn.Module, trial: Trial) -> None:
        stand_in(self, plain)
        self.trial = trial
        self.routing: Routing | None = None

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        weight, grad = self.weight, torch.is_grad_enabled()
        if args or x.dtype != weight.dtype or (grad and weight.requires_grad) or not _has_kernel(x):
            return self.plain.forward(x, *args)
        exact, near = (None, None) if ops.observed() else self.trial.recipes(self.plain)
        rounds = exact is None and self.routing is not None and self.routing.rounds
        recipe = near if rounds else exact
        if recipe is None:
            return self.plain.forward(x)
        return _Norm.apply(x, weight, recipe) if grad and x.requires_grad else recipe(x, weight)


def _has_kernel(x: Tensor) -> bool:
    if x.is_cuda:
        return triton.available() and x.dtype != torch.float64
    return toolchain.native(x) is not None


class _Recipe:
    """How norms.c has to be called to give a norm's bits; `kind` is explained there."""

    def __init__(self, dtype: torch.dtype, epsilon: float, kind: int) -> None:
        self.epsilon = epsilon
        self.kind = kind
        probe = torch.empty(0, dtype=dtype)
        self._function = toolchain.function("rms_norm", probe, 0, 0, probe, epsilon, kind, probe)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        x, width = x.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        settings = weight.data_ptr(), self.epsilon, self.kind
        self._function(x.data_ptr(), x.numel() // width, width, *settings, out.data_ptr(), torch.get_num_threads())
        return out

    def gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        x, gain = x.contiguous(), weight.float() + (self.kind == 2)
        out, rows = torch.empty_like(x), x.numel() // len(gain)
        toolchain.call("rms_norm_grad", grad.contiguous(), x, rows, len(gain), gain, self.epsilon, out)
        return out


class _GpuRecipe:
    """The same of triton/rms_norm.py."""

    def __init__(self, epsilon: float, kind: int) -> None:
        self.epsilon = epsilon
        self.kind = kind

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return _kernels().rms_norm(x, weight, self.epsilon, self.kind)

    def gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return _kernels().rms_norm_grad(grad, x, weight, self.epsilon, self.kind)


@cache
def _kernels() -> Any:
    return import_module("students.kernels.triton.rms_norm")


ROWS = (1, 2, 4, 8, 64)
"""Numbers of rows for which a GPU adds up in different orders."""


class Recipes(NamedTuple):
    """What computes a norm in one pass; None: nothing does."""

    exact: _Recipe | _GpuRecipe | None = None
    """With its bits."""
    near: _GpuRecipe | None = None
    """But for rounding."""


class Trial:
    """What computes norms of one class, width and epsilon, which is found at their first call."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self._found: dict[tuple[torch.dtype, torch.device], Recipes] = {}  # of nothing else

    def recipes(self, norm: nn.Module) -> Recipes:
        """None are found where there was no trial yet for this type and device and now is no time for one."""
        key = norm.weight.dtype, norm.weight.device
        if key not in self._found:
            if norm.weight.is_cuda and torch.cuda.is_current_stream_capturing():
                return Recipes()
            self._found[key] = self._find(norm) if norm.weight.ndim == 1 else Recipes()
        return self._found[key]

    @torch.no_grad()
    def _find(self, norm: nn.Module) -> Recipes:
        """By a trial on numbers drawn for the purpose, first of the order of sums, in float32, then of the rest."""
        draw, width, device = torch.Generator().manual_seed(0), len(norm.weight), norm.weight.device
        gpu = device.type == "cuda"

        def make(dtype: torch.dtype, kind: int) -> _Recipe | _GpuRecipe:
            return _GpuRecipe(self.epsilon, kind) if gpu else _Recipe(dtype, self.epsilon, kind)

        def same(recipe: _Recipe | _GpuRecipe, x: Tensor, weight: Tensor, other: Callable[[Tensor], Tensor]) -> bool:
            return all(torch.equal(recipe(x[:rows], weight), other(x[:rows])) for rows in ROWS)

        def plain(x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)

        x = (torch.randn(64, width, generator=draw) * torch.logspace(-2, 2, 64).unsqueeze(1)).to(device)
        sums = same(make(torch.float32, 1), x, torch.ones(width, device=device), plain)
        if not sums and not gpu:
            return Recipes()
        norm, x = copy.deepcopy(norm), x.to(norm.weight.dtype)
        norm.weight.copy_(torch.randn(width, generator=draw))
        recipes = [make(x.dtype, kind) for kind in range(3)]
        exact = next((recipe for recipe in recipes if sums and same(recipe, x, norm.weight, norm.forward)), None)
        if exact is not None or not gpu:
            return Recipes(exact)
        expected = norm(x).float()
        errors = [(recipe(x, norm.weight).float() - expected).abs() for recipe in recipes]
        best = min(range(len(recipes)), key=lambda kind: float(errors[kind].max()))
        limit = 4 * torch.finfo(x.dtype).eps * expected.abs() + 1e-6
        return Recipes(near=recipes[best] if bool((errors[best] <= limit).all()) else None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Trial:
        memo[id(self)] = trial = Trial(self.epsilon)  # C functions cannot be copied
        return trial


class _Norm(torch.autograd.Function):
    """A norm with the gradient by its input; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: _Recipe | _GpuRecipe) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        return recipe(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.recipe.gradient(grad, *ctx.saved_tensors), None, None
