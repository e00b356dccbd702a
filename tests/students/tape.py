"""A recorder for CPUs that replays operators as a CUDA graph replays kernels, and so fails where a graph would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.students.host_waits import NoHostWaits


class Borrowed:
    """A tensor from before the recording, which does not keep it alive: a CUDA graph knows its address only."""

    def __init__(self, x: Tensor) -> None:
        self._storage = StorageWeakRef(x.untyped_storage())
        self._dtype, self._place = x.dtype, (x.storage_offset(), x.shape, x.stride())

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        assert storage is not None, "a recording reads what has been freed since"
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._place)


class Tape(TorchDispatchMode):
    """A recording of `work`, which runs once to warm up and once more to have its operators recorded.

    A call replays the operators on the same tensors, and nothing else: no module and no hook runs, and Python numbers
    keep the values that they had when recorded. What the operators read has to be there still."""

    made = 0
    """Number of tapes made so far."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        super().__init__()
        Tape.made += 1
        self._steps: list[tuple[Any, Any, Any, Any]] = []
        self._own: set[int] = set()
        """Storages of what the recording has made."""
        work()
        with NoHostWaits(), self:
            self._out = work()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = function(*args, **(kwargs or {}))
        self._own |= {_storage(x) for x in tree_leaves(out) if isinstance(x, Tensor)} - (given - self._own)
        self._steps.append((function, *tree_map(self._kept, (args, kwargs or {}, out))))
        return out

    def _kept(self, x: Any) -> Any:
        """Return what is recorded in place of an argument or a result."""
        mine = not isinstance(x, Tensor) or x.is_mkldnn or _storage(x) in self._own
        return x if mine else Borrowed(x)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        for function, args, kwargs, out in self._steps:
            args, kwargs = tree_map(lambda x: x.tensor() if isinstance(x, Borrowed) else x, (args, kwargs))
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self._out


def _storage(x: Tensor) -> int:
    return 0 if x.is_mkldnn else x.untyped_storage()._cdata
