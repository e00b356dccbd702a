"""Work that is recorded once on a CPU and done again as a list of calls: for one token its operators take microseconds,
and the modules between them as long again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from students.kernels import ops
from students.kernels.cpu import toolchain

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operators that answer with numbers or shapes that depend on data."""


class Replay(TorchDispatchMode):
    """A recorder for CPUs: work on tensors that stay where they are; its operators run again on the same tensors.

    C functions are called as they are, with the addresses that they had. The result is overwritten by the next call.
    RuntimeError where what is to be done depends on data.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[Callable[[int], Any]] = []
        """Each takes the number of threads."""
        self._kept: list[Any] = []
        """Results, of which C functions know the addresses."""
        with torch.inference_mode(False), torch.no_grad():  # they are written in calls of either kind
            work()  # what is made once is made
            toolchain.recording.calls = self._calls
            try:
                with self:
                    self._out = work()
            finally:
                toolchain.recording.calls = None

    def __call__(self) -> Any:
        threads = torch.get_num_threads()
        with torch.inference_mode():
            for call in self._calls:
                call(threads)
        return self._out

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if WAITS & {*function.tags}:
            raise RuntimeError(f"{function} depends on data")
        if function.namespace == "elastic":
            with self:
                return ops.on_cpu(function)(*args, **kwargs)
        out = function(*args, **kwargs)
        self._kept.append(out)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if function._schema.is_mutable:
            self._calls.append(lambda threads: function(*args, **kwargs))
        elif (
            made
            and "empty" not in function.__name__
            and _place(made[0]) not in map(_place, tree_leaves((args, kwargs)))
        ):
            self._calls.append(_again(function, args, kwargs, made))
        return out


def _place(x: Any) -> int | None:
    """Where the memory of a tensor is, of which others may be views."""
    return x.untyped_storage().data_ptr() if isinstance(x, Tensor) and not x.is_mkldnn else None


def _again(function: Any, args: Any, kwargs: Any, made: list[Tensor]) -> Callable[[int], Any]:
    """What runs an operator again, with its results where the first ones are."""

    def takes(operator: Any) -> list[str]:
        return [f"{x.type} {x.name}" for x in operator._schema.arguments]

    others = [getattr(function._overloadpacket, name) for name in function._overloadpacket.overloads()]
    for other in others:
        if takes(other) == [*takes(function), "Tensor out"]:
            return lambda threads: other(*args, **kwargs, out=made[0])

    def run(threads: int) -> None:
        again = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
        for old, new in zip(made, again, strict=True):
            old.copy_(new)

    return run
