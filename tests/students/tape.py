"""A recorder for CPUs that replays operators as a CUDA graph replays kernels, and so fails where a graph would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.students.host_waits import NoHostWaits


class Tape(TorchDispatchMode):
    """A recording of `work`, which runs once to warm up and once more to have its operators recorded.

    A call replays the operators on the same tensors, and nothing else: no module and no hook runs, and Python numbers
    keep the values that they had when recorded."""

    made = 0
    """Number of tapes made so far."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        super().__init__()
        Tape.made += 1
        self._steps: list[tuple[Any, Any, Any, Any]] = []
        work()
        with NoHostWaits(), self:
            self._out = work()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self._steps.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def __call__(self) -> Tensor:
        for function, args, kwargs, out in self._steps:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self._out
