"""Tensors that whoever reads them computes along with its own work, so that a token's step on a GPU launches less.

A block adds what its layers put out to the residual stream, normalises that for the next layers, and multiplies an
MLP's gate with up: launches of their own, each of which takes longer to start than to run. Layers that read some
channels can do all of it (see `ops.fused_channels`), but a model's code asks for one thing after the other. What it
gets here in the place of tensors knows what has been asked for so far. The next layers compute it; anything else that
looks at it finds it computed as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "__len__")),
}
"""What can be asked of a tensor that is not computed."""
_ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_MULTIPLY = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.silu, lambda x: F.gelu(x, approximate="tanh"))
"""Those that kernels know, in the order of their numbers."""


class Entering(NamedTuple):
    """What layers read, as the first arguments of `ops.fused_channels`."""

    x: Tensor
    other: Tensor | None = None
    squares: Tensor | None = None
    epsilon: float = 0.0
    kind: int = -1


class Deferred(Tensor):
    """In the place of a tensor of this shape, and of the type and on the device of `like`."""

    made: Tensor | None

    @staticmethod
    def __new__(cls, shape: torch.Size, like: Tensor, *rest: Any) -> Deferred:
        """As torch has it for tensors with no memory."""
        new: Deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        new.made = None
        return new

    def compute(self) -> Tensor:
        """The tensor, by what computes it alone."""
        raise NotImplementedError

    def settle(self) -> Tensor:
        """The tensor."""
        if self.made is None:
            self.made = self.compute()
        return self.made

    def entering(self) -> Entering:
        """What layers read who read this."""
        return Entering(_rows(self.settle()))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        joined = _joined(func, args, kwargs)
        if joined is not None:
            return joined
        args, kwargs = tree_map(settled, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(settled, (args, kwargs or {}))
        return func(*args, **kwargs)


class Output(Deferred):
    """What a layer puts out. launch(residual [..., O], or None) -> the sum, and its sums of squares [B, n]."""

    def __init__(
        self, shape: torch.Size, like: Tensor, launch: Callable[[Tensor | None], tuple[Tensor, Tensor]]
    ) -> None:
        self.launch = launch

    def compute(self) -> Tensor:
        """The layer alone."""
        return self.launch(None)[0]


class Sum(Deferred):
    """That and the residual stream."""

    squares: Tensor

    def __init__(self, shape: torch.Size, like: Tensor, output: Output) -> None:
        self.residual, self.output = like, output

    def compute(self) -> Tensor:
        """The layer adds it."""
        out, self.squares = self.output.launch(self.residual)
        return out


class Normed(Deferred):
    """The RMS norm of that. kind: as in `ops.rms_norm`; run: what computes it alone."""

    def __init__(
        self,
        shape: torch.Size,
        source: Sum,
        weight: Tensor,
        epsilon: float,
        kind: int,
        run: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.source, self.weight, self.epsilon, self.kind, self.run = source, weight, epsilon, kind, run

    def compute(self) -> Tensor:
        """In one launch."""
        return self.run(self.source.settle(), self.weight)

    def entering(self) -> Entering:
        """Layers normalise what they read, unless somebody has done so."""
        if self.made is not None:
            return super().entering()
        x = _rows(self.source.settle())
        return Entering(x, self.weight, self.source.squares, self.epsilon, self.kind)


class Gate(Deferred):
    """What an MLP's gate has put out, before its activation."""

    def __init__(self, shape: torch.Size, like: Tensor) -> None:
        self.made = like


class Active(Deferred):
    """Behind it."""

    def __init__(self, shape: torch.Size, like: Tensor, kind: int) -> None:
        self.gate, self.kind = like, kind

    def compute(self) -> Tensor:
        """By torch."""
        return ACTIVATIONS[self.kind](self.gate)


class Gated(Deferred):
    """The product with what up has put out."""

    def __init__(self, shape: torch.Size, like: Tensor, active: Active) -> None:
        self.up, self.active = like, active

    def compute(self) -> Tensor:
        """By torch."""
        return self.active.settle() * self.up

    def entering(self) -> Entering:
        """Layers multiply what they read, unless somebody has done so."""
        if self.made is not None:
            return super().entering()
        return Entering(_rows(self.active.gate), _rows(self.up), kind=3 + self.active.kind)


def settled(x: Any) -> Any:
    """x, computed if it is a tensor that is not."""
    return x.settle() if isinstance(x, Deferred) else x


def entering(x: Tensor) -> Entering:
    """What layers read who read x [..., I]."""
    return x.entering() if isinstance(x, Deferred) else Entering(_rows(x))


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def _joined(func: Any, args: Any, kwargs: Any) -> Deferred | None:
    """What has been asked for of tensors that are not computed, where that can wait in its turn."""
    if func in _ADD | _MULTIPLY and len(args) == 2 and not kwargs:
        kind = Output if func in _ADD else Active
        for one, other in (args, args[::-1]):
            if isinstance(one, kind) and one.made is None and _alike(one, other):
                make: Any = Sum if kind is Output else Gated
                joined: Deferred = make(one.shape, settled(other), one)
                return joined
    if func is F.dropout and len(args) == 1 and not kwargs.get("training", True):
        same: Deferred = args[0]
        return same
    if args and isinstance(args[0], Gate):
        options = {name: value for name, value in kwargs.items() if value}
        for number, known in enumerate(((F.silu, {}), (F.gelu, {"approximate": "tanh"}))):
            if (func, options) == known and len(args) == 1:
                return Active(args[0].shape, args[0].settle(), number)
    return None


def _alike(one: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
