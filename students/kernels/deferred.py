"""Deferred tensors, which the kernel that reads them computes in its own launch: fewer launches in a GPU's decode step.

A block adds the outputs of its layers to the residual stream, normalises the sum for the next layers, and multiplies an
MLP's gate with up. Each of these launches takes longer to start than to run. Layers that read some channels can include
all of this work (see `ops.fused_channels`), but the model's code calls one operator after the other. Instead of tensors
the code gets deferred tensors, which record the operators:

    output, then + the residual stream (Stream), then its norm -> read by the next layers
    gate, then its activation, then * up                       -> read by the next layer

Layers get the recorded operators from `entering`. Where too many inputs are read together for such layers, the
operators are part of the launch that closes channels in front of a dense product (`gated`), and an output is computed
at once, but its sum with the residual stream is not (`Sum`). Any other use of a deferred tensor computes it as usual,
once.
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

from students.kernels import ops

_FACTS = {getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "__len__")}
_FACTS |= {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")}
"""Properties of a deferred tensor that are known before it is computed."""
ADD = torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__
_MULTIPLY = torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__
ACTIVATIONS: tuple[tuple[Callable[..., Tensor], dict[str, Any]], ...] = (F.silu, {}), (F.gelu, {"approximate": "tanh"})
"""Activation functions of the kernels, in the order of the kernels' numbers, and the options of each function."""


class Entering(NamedTuple):
    """The input of linear layers, as the first arguments of `ops.fused_channels`."""

    x: Tensor
    other: Tensor | None = None
    squares: Tensor | None = None
    epsilon: float = 0.0
    kind: int = -1


class Deferred(Tensor):
    """A tensor that is not computed yet, of this shape, and of the dtype and on the device of `like`.

    compute: returns the computed tensor. read: returns the input of layers that read the tensor (None: the computed
    tensor). close: maps limits [I] to the tensor as rows [B, I], computed with channels below the limits set to 0.
    joins: by torch function that can be deferred in turn, or run in the same launch, the options that the function must
    have, and a function that maps the other tensor argument to the result.
    """

    made: Tensor | None = None

    @staticmethod
    def __new__(cls, shape: torch.Size, like: Tensor, *rest: Any, **more: Any) -> Deferred:
        """Create a tensor without memory, as torch's wrapper subclasses are created."""
        new: Deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        return new

    def __init__(
        self,
        shape: torch.Size,
        like: Tensor,
        compute: Callable[[], Any],
        read: Callable[[], Entering] | None = None,
        joins: Mapping[Any, tuple[dict[str, Any], Callable[..., Tensor]]] = MappingProxyType({}),
        close: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.compute, self.read, self.joins, self.close = compute, read, joins, close

    def settle(self) -> Tensor:
        """Return the tensor, computed at the first call."""
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
                if options == expected and all(alike(one, other) for other in others):
                    return join(*map(settled, others))
        return func(*tree_map(settled, args), **tree_map(settled, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(settled, args), **tree_map(settled, kwargs or {}))


Launch = Callable[[Tensor | None], tuple[Tensor, Tensor]]
"""(residual stream [..., O] or None) -> the layers' outputs plus the stream, and the sum's sums of squares [B, n]."""


class Stream(Deferred):
    """A deferred residual stream: the sum of the previous stream and a layer's output."""

    squares: Tensor

    def __init__(self, shape: torch.Size, like: Tensor, launch: Launch) -> None:
        super().__init__(shape, like, partial(launch, like))

    def settle(self) -> Tensor:
        """Return the tensor; the first call computes it and `squares`, the sums of squares [B, n]."""
        if self.made is None:
            self.made, self.squares = self.compute()
        return self.made

    def normed(self, weight: Tensor, epsilon: float, kind: int, run: Callable[[Tensor, Tensor], Tensor]) -> Deferred:
        """Return the deferred RMS norm of the stream. kind: as in `ops.rms_norm`; run: computes the norm by itself."""

        def read() -> Entering:
            return Entering(_rows(self.settle()), weight, self.squares, epsilon, kind)

        return Deferred(self.shape, self, lambda: run(self.settle(), weight), read)


class Sum(Stream):
    """A deferred residual stream: the sum of the previous stream and `out`, the output of layers that have run."""

    def __init__(self, shape: torch.Size, residual: Tensor, out: Tensor) -> None:
        self.terms: list[Tensor] = [residual, out]  # emptied when the sum is made: a prompt's are large
        Deferred.__init__(self, shape, residual, partial(_sum, self.terms))

    def settle(self) -> Tensor:
        """Return the tensor, computed at the first call."""
        return Deferred.settle(self)

    def normed(self, weight: Tensor, epsilon: float, kind: int, run: Callable[[Tensor, Tensor], Tensor]) -> Deferred:
        """Return the deferred RMS norm of the stream, as `Stream.normed`."""

        def close(limit: Tensor) -> Tensor:
            if self.made is not None:
                return ops.fused_gate(_rows(self.made), weight, None, epsilon, kind, limit)[0]
            residual, out = map(_rows, self.terms)
            closed, stream = ops.fused_gate(out, weight, residual, epsilon, kind, limit)
            self.made = stream.view(self.shape)
            self.terms.clear()
            return closed

        return Deferred(self.shape, self, lambda: run(self.settle(), weight), close=close)


def _sum(terms: list[Tensor]) -> Tensor:
    residual, out = terms
    terms.clear()
    return residual + out


def summand(out: Tensor) -> Deferred:
    """Return out, the output of layers that have run, as a tensor that defers its addition to the residual stream."""

    def add(residual: Tensor) -> Deferred:
        return Sum(out.shape, residual, out)

    return Deferred(out.shape, out, lambda: out, joins=dict.fromkeys(ADD, ({}, add)))


def output(shape: torch.Size, like: Tensor, launch: Launch) -> Deferred:
    """Return the deferred output of a layer whose launch can also add a residual stream."""

    def add(residual: Tensor) -> Deferred:
        return Stream(shape, residual, launch)

    return Deferred(shape, like, lambda: launch(None)[0], joins=dict.fromkeys(ADD, ({}, add)))


def addend(like: Tensor, launch: Callable[[Tensor | None], Tensor]) -> Deferred:
    """Return launch(None), a tensor like `like`, deferred: its sum with a residual stream is launch(stream)."""
    return Deferred(like.shape, like, partial(launch, None), joins=dict.fromkeys(ADD, ({}, launch)))


def gate(x: Tensor) -> Deferred:
    """Return x [..., I], the output of an MLP's gate, as a tensor that defers its activation and product with up."""

    def active(kind: int) -> Deferred:
        function, options = ACTIVATIONS[kind]

        def times(up: Tensor) -> Deferred:
            read = partial(Entering, _rows(x), _rows(up), kind=3 + kind)

            def close(limit: Tensor) -> Tensor:
                return ops.fused_gate(_rows(x), _rows(up), None, 0.0, 3 + kind, limit)[0]

            return Deferred(x.shape, x, lambda: function(x, **options) * up, read, close=close)

        return Deferred(x.shape, x, lambda: function(x, **options), joins=dict.fromkeys(_MULTIPLY, ({}, times)))

    joins = {function: (options, partial(active, kind)) for kind, (function, options) in enumerate(ACTIVATIONS)}
    return Deferred(x.shape, x, lambda: x, joins=joins)


def activated(x: Tensor, kind: int) -> Deferred:
    """Return the activation of this kind of x [..., I], as a tensor whose product with another one is one launch."""
    function, options = ACTIVATIONS[kind]

    def times(other: Tensor) -> Tensor:
        return ops.fused_gate(_rows(x), _rows(other), None, 0.0, 3 + kind, None)[0].view(x.shape)

    return Deferred(x.shape, x, lambda: function(x, **options), joins=dict.fromkeys(_MULTIPLY, ({}, times)))


def settled(x: Any) -> Any:
    """Return the computed tensor if x is a Deferred, else x itself."""
    return x.settle() if isinstance(x, Deferred) else x


def entering(x: Tensor) -> Entering:
    """Return the input of layers that read x [..., I], as rows [B, I], with the operators that x has recorded."""
    read = x.read if isinstance(x, Deferred) and x.made is None else None
    return Entering(_rows(settled(x))) if read is None else read()


def gated(x: Tensor, limit: Tensor) -> Tensor:
    """Return x [..., I] as rows [B, I] with 0 where the magnitude is below limit [I]; the operators that x has recorded
    run in the same launch."""
    if isinstance(x, Deferred) and x.made is None and x.close is not None:
        return x.close(limit)
    return ops.channel_gate(_rows(settled(x)), limit)[0]


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def alike(one: Tensor, other: Any) -> bool:
    """Whether `other` is a tensor of the same shape, dtype and device as `one`."""
    return isinstance(other, Tensor) and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
