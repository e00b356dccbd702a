"""RMS norms (arXiv 1910.07467) in one pass, in the places of a model's own.

Written in Python, as transformers has them, they are eight operators in float32 and leave a dozen behind for backward.
The forward pass has the same bits: it is used only for norms for which a trial shows that. On a GPU where no order of
sums gives them, what differs by rounding is used while routers skip or learn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from students.kernels import autograd, direct, ops
from students.kernels.deferred import Stream, settled
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

    weight: nn.Parameter
    plain: nn.Module

    def __init__(self, plain: nn.Module, trial: Trial) -> None:
        stand_in(self, plain)
        self.trial = trial
        self.routing: Routing | None = None

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        weight, grad = self.weight, torch.is_grad_enabled()
        if args or x.dtype != weight.dtype or (grad and weight.requires_grad) or not ops.compiled(x) or ops.observed():
            return self._plainly(x, *args)
        exact, near = self.trial.recipes(self.plain, weight)
        may_round = self.routing is not None and self.routing.rounds
        recipe = near if exact is None and may_round else exact
        if recipe is None:
            return self._plainly(x)
        if isinstance(x, Stream) and may_round:  # squares are not summed in torch's order
            return x.normed(weight, self.trial.epsilon, recipe.kind, recipe.run)
        x = settled(x)
        if grad and x.requires_grad:
            return autograd.rms_norm(x, weight, recipe.run, self.trial.epsilon, recipe.kind)
        return recipe.run(x, weight)

    def _plainly(self, x: Tensor, *args: Any) -> Tensor:
        out: Tensor = self.plain.forward(x, *args)
        return out


ROWS = (1, 2, 4, 8, 64)
"""Numbers of rows for which a GPU adds up in different orders."""


class Recipe(NamedTuple):
    """How an operator computes a norm."""

    kind: int
    """As in `ops.rms_norm`."""
    run: Callable[[Tensor, Tensor], Tensor]
    """The operator, for (x, weight)."""


class Recipes(NamedTuple):
    """What computes a norm in one pass; None: nothing does."""

    exact: Recipe | None = None
    """With its bits."""
    near: Recipe | None = None
    """But for rounding."""


class Trial:
    """What computes norms of one class, width and epsilon, which is found at their first call."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self._found: dict[tuple[torch.dtype, torch.device], Recipes] = {}  # of nothing else

    def recipes(self, norm: nn.Module, weight: Tensor) -> Recipes:
        """None are found where there was no trial yet for this type and device and now is no time for one."""
        key = weight.dtype, weight.device
        if key not in self._found:
            if weight.is_cuda and torch.cuda.is_current_stream_capturing():
                return Recipes()
            self._found[key] = self._find(norm, weight) if weight.ndim == 1 else Recipes()
        return self._found[key]

    @torch.no_grad()
    def _find(self, norm: nn.Module, weight: Tensor) -> Recipes:
        """By a trial on numbers drawn for the purpose, first of the order of sums, in float32, then of the rest."""
        draw, width, device = torch.Generator().manual_seed(0), len(weight), weight.device
        gpu = device.type == "cuda"

        def make(dtype: torch.dtype, kind: int) -> Recipe:
            return Recipe(kind, direct.rms_norm(dtype, device, self.epsilon, kind))

        def same(recipe: Recipe, x: Tensor, weight: Tensor, other: Callable[[Tensor], Tensor]) -> bool:
            return all(torch.equal(recipe.run(x[:rows], weight), other(x[:rows])) for rows in ROWS)

        def plain(x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)

        x = (torch.randn(64, width, generator=draw) * torch.logspace(-2, 2, 64).unsqueeze(1)).to(device)
        sums = same(make(torch.float32, 1), x, torch.ones(width, device=device), plain)
        if not sums and not gpu:
            return Recipes()
        other, x = copy.deepcopy(norm), x.to(weight.dtype)
        gain = other.get_parameter("weight").copy_(torch.randn(width, generator=draw))
        recipes = [make(x.dtype, kind) for kind in range(3)]
        exact = next((recipe for recipe in recipes if sums and same(recipe, x, gain, other.forward)), None)
        if exact is not None or not gpu:
            return Recipes(exact)
        expected = other(x).float()
        errors = [(recipe.run(x, gain).float() - expected).abs() for recipe in recipes]
        best = min(range(len(recipes)), key=lambda kind: float(errors[kind].max()))
        limit = 4 * torch.finfo(x.dtype).eps * expected.abs() + 1e-6
        return Recipes(near=recipes[best] if bool((errors[best] <= limit).all()) else None)
