"""RMS norms (arXiv 1910.07467) in one pass, in place of a model's own norm modules.

A norm written in Python, as in transformers, is eight operators in float32 and a dozen in backward. The one-pass
forward has the same bits: it is used only for norms for which a trial shows that. On a GPU where no order of summation
gives these bits, a kernel that differs by rounding is used while routers skip or learn.
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
    """Let the frozen RMS norms of a model run in one pass; norms are found by the name of their class.

    Each norm is replaced by a FusedNorm. Norms of one class, width and epsilon share a trial.
    """
    trials: dict[tuple[Any, ...], Trial] = {}
    found: dict[nn.Module, nn.Module] = {}
    for norm in model.modules():
        weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if type(norm).__name__.endswith("RMSNorm") and weight is not None and epsilon is not None:
            found[norm] = FusedNorm(norm, trials.setdefault((type(norm), weight.shape, epsilon), Trial(epsilon)))
    exchange(model, found)


class Routing(Protocol):
    """What a norm needs to know of the student that it belongs to (implemented in students/execution/runtime.py)."""

    @property
    def rounds(self) -> bool:
        """Whether this call may differ from the teacher by rounding even where all gates are open."""
        ...


def let_round(part: nn.Module, routing: Routing) -> None:
    """Let the fused norms in `part` of a model differ from the model's norms by rounding while `routing.rounds`."""
    for norm in part.modules():
        if isinstance(norm, FusedNorm):
            norm.routing = routing


class FusedNorm(nn.Module):
    """Stands in for a norm module, with the same parameters: x [..., D] -> [..., D].

    The norm's own forward runs where there is no kernel, where the weight is trained, where operations are counted or
    compiled, and where the norm computes something that the kernels do not.
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
        if not isinstance(x, Stream) and x.stride(-1) != 1:  # torch sums these in another order than the trial's
            exact = None
        recipe = near if exact is None and may_round else exact
        if recipe is None:
            return self._plainly(x)
        if isinstance(x, Stream) and may_round:  # its squares are not summed in torch's order
            return x.normed(weight, self.trial.epsilon, recipe.kind, recipe.run)
        x = settled(x)
        if grad and x.requires_grad:
            return autograd.rms_norm(x, weight, recipe.run, self.trial.epsilon, recipe.kind)
        return recipe.run(x, weight)

    def _plainly(self, x: Tensor, *args: Any) -> Tensor:
        out: Tensor = self.plain.forward(x, *args)
        return out


ROWS = (1, 2, 4, 8, 64)
"""Numbers of rows for which torch sums in different orders on a GPU."""


class Recipe(NamedTuple):
    """An operator, and the settings with which it computes a norm."""

    kind: int
    """The variant of the norm, as in `ops.rms_norm`."""
    run: Callable[[Tensor, Tensor], Tensor]
    """The operator as a function of (x, weight)."""


class Recipes(NamedTuple):
    """Recipes that compute a norm in one pass; None where there is none."""

    exact: Recipe | None = None
    """A recipe with the same bits as the norm's own forward."""
    near: Recipe | None = None
    """A recipe that differs from the norm's own forward by rounding only; searched on GPUs where no recipe is exact."""


class Trial:
    """Finds, at the first call, the recipes for norms of one class, width and epsilon by comparing results."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self._found: dict[tuple[torch.dtype, torch.device], Recipes] = {}  # recipes depend on nothing else

    def recipes(self, norm: nn.Module, weight: Tensor) -> Recipes:
        """Return the recipes for the weight's dtype and device, found by a trial at the first call. Without a trial so
        far, a CUDA graph capture gets no recipes: a trial cannot run during capture."""
        key = weight.dtype, weight.device
        if key not in self._found:
            if weight.is_cuda and torch.cuda.is_current_stream_capturing():
                return Recipes()
            self._found[key] = self._find(norm, weight) if weight.ndim == 1 else Recipes()
        return self._found[key]

    @torch.no_grad()
    def _find(self, norm: nn.Module, weight: Tensor) -> Recipes:
        """Return the recipes that pass a trial on random numbers: first of the order of summation, in float32, then of
        the whole norm in the weight's dtype."""
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
