"""Tensors that whoever reads them computes along with its own work, so that a token's step on a GPU launches less.

A block adds what its layers put out to the residual stream, normalises that for the next layers, and multiplies an
MLP's gate with up: launches of their own, each of which takes longer to start than to run. Layers that read some
channels can do all of it (see `ops.fused_channels`), but a model's code asks for one thing after the other. In the
place of tensors it gets these, which note what it asks for:

    output, then + the residual stream (Stream), then its norm -> read by the next layers
    gate, then its activation, then * up                       -> read by the next layer

Layers take what is noted (`entering`). Anybody else, and any other question, finds the tensor computed as ever, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

_FACTS = {getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "__len__")}
_FACTS |= {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")}
"""What can be asked of a tensor that is not computed."""
_ADD = torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__
_MULTIPLY = torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__
ACTIVATIONS: tuple[tuple[Callable[..., Tensor], dict[str, Any]], ...] = (F.silu, {}), (F.gelu, {"approximate": "tanh"})
"""Those that kernels know, in the order of their numbers, and their options."""


class Entering(NamedTuple):
    """What layers read, as the first arguments of `ops.fused_channels`."""

    x: Tensor
    other: Tensor | None = None
    squares: Tensor | None = None
    epsilon: float = 0.0
    kind: int = -1


class Deferred(Tensor):
    """In the place of a tensor of this shape, and of the type and on the device of `like`.

    compute: what computes it alone. read: what layers read in its place (None: the tensor). joins: functions of torch
    that can wait in their turn, with their options, and what makes a Deferred of the other tensor they are given.
    """

    made: Tensor | None = None

    @staticmethod
    def __new__(cls, shape: torch.Size, like: Tensor, *rest: Any, **more: Any) -> Deferred:
        """As torch has it for tensors with no memory."""
        new: Deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        return new

    def __init__(
        self,
        shape: torch.Size,
        like: Tensor,
        compute: Callable[[], Any],
        read: Callable[[], Entering] | None = None,
        joins: Mapping[Any, tuple[dict[str, Any], Callable[..., Deferred]]] = MappingProxyType({}),
    ) -> None:
        self.compute, self.read, self.joins = compute, read, joins

    def settle(self) -> Tensor:
        """The tensor."""
        if self.made is None:
            self.made = self.compute()
        return self.made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.dropout and not kwargs["training"]:
            return args[0]
        options = {name: value for name, value in kwargs.items() if value is not False}
        for one, *others in (args, args[::-1]) if args else ():
            if isinstance(one, Deferred) and one.made is None and func in one.joins:
                expected, join = one.joins[func]
                if options == expected and all(_alike(one, other) for other in others):
                    return join(*map(settled, others))
        return func(*tree_map(settled, args), **tree_map(settled, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(settled, args), **tree_map(settled, kwargs or {}))


Launch = Callable[[Tensor | None], tuple[Tensor, Tensor]]
"""(residual stream [..., O] or None) -> what layers put out, added to that, and the sums of squares of this [B, n]."""


class Stream(Deferred):
    """A residual stream, to which a layer adds what it puts out."""

    squares: Tensor

    def __init__(self, shape: torch.Size, like: Tensor, launch: Launch) -> None:
        super().__init__(shape, like, partial(launch, like))

    def settle(self) -> Tensor:
        """The tensor, and its squares."""
        if self.made is None:
            self.made, self.squares = self.compute()
        return self.made

    def normed(self, weight: Tensor, epsilon: float, kind: int, run: Callable[[Tensor, Tensor], Tensor]) -> Deferred:
        """Its RMS norm. kind: as in `ops.rms_norm`; run: what computes it alone."""

        def read() -> Entering:
            return Entering(_rows(self.settle()), weight, self.squares, epsilon, kind)

        return Deferred(self.shape, self, lambda: run(self.settle(), weight), read)


def output(shape: torch.Size, like: Tensor, launch: Launch) -> Deferred:
    """What a layer puts out, in a launch that can add it to a residual stream."""

    def add(residual: Tensor) -> Deferred:
        return Stream(shape, residual, launch)

    return Deferred(shape, like, lambda: launch(None)[0], joins=dict.fromkeys(_ADD, ({}, add)))


def gate(x: Tensor) -> Deferred:
    """What an MLP's gate has put out, x."""

    def active(kind: int) -> Deferred:
        function, options = ACTIVATIONS[kind]

        def times(up: Tensor) -> Deferred:
            read = partial(Entering, _rows(x), _rows(up), kind=3 + kind)
            return Deferred(x.shape, x, lambda: function(x, **options) * up, read)

        return Deferred(x.shape, x, lambda: function(x, **options), joins=dict.fromkeys(_MULTIPLY, ({}, times)))

    joins = {function: (options, partial(active, kind)) for kind, (function, options) in enumerate(ACTIVATIONS)}
    return Deferred(x.shape, x, lambda: x, joins=joins)


def settled(x: Any) -> Any:
    """x, computed if it is a tensor that is not."""
    return x.settle() if isinstance(x, Deferred) else x


def entering(x: Tensor) -> Entering:
    """What layers read who read x [..., I]."""
    read = x.read if isinstance(x, Deferred) and x.made is None else None
    return Entering(_rows(settled(x))) if read is None else read()


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def _alike(one: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
