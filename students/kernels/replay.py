"""Work on a CPU that is recorded once and replayed as a list of calls: for one token, operators take microseconds, and
the Python modules around them as long again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from students.kernels import ops
from students.kernels.cpu import toolchain
from students.kernels.trial import written

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operators that return numbers or shapes that depend on data."""
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.clone.default}
"""Operators whose result is that of `copy_` into a tensor of its type, which allocates nothing."""
ALIGNED = 64
"""Multiple of bytes that blocks of memory have."""
RECORDED = 8
"""Number of the run that is recorded. Recording costs about as much as so many replays save; earlier runs make what is
made only once."""


class DependsOnData(Exception):
    """Raised when work that is being recorded reads a number or shape that a replay could not update."""


class Blocks:
    """Memory for the results of recorded calls. A block is free for a later result when the work that is being recorded
    holds no tensor in it any more: replayed in the same order, each call finds its arguments where they were."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[Tensor, StorageWeakRef]] = {}
        """By address, the bytes of a block and what the work holds of it."""

    def __contains__(self, x: Tensor) -> bool:
        return x.layout == torch.strided and x.untyped_storage().data_ptr() in self._blocks

    def like(self, x: Tensor) -> Tensor:
        """Return a tensor with the shape, strides and type of x, whose block is taken until no view of it is held."""
        end = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        size = -(-max(1, end) * x.element_size() // ALIGNED) * ALIGNED
        free = [block for block, held in self._blocks.values() if size <= len(block) <= 2 * size and held.expired()]
        block = min(free, key=len) if free else torch.empty(size, dtype=torch.uint8)
        held = torch.from_numpy(block.numpy())  # a storage of its own at the same address
        self._blocks[block.data_ptr()] = block, StorageWeakRef(held.untyped_storage())
        return held.view(x.dtype).as_strided(x.shape, x.stride())

    def unheld(self, x: Tensor) -> Tensor:
        """Return a tensor at the same place as x, for calls to keep: one in a block leaves the block free."""
        if x not in self:
            return x
        block = self._blocks[x.untyped_storage().data_ptr()][0]
        return block.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


class Replay(TorchDispatchMode):
    """A recorder for CPUs: work on tensors that stay where they are; a replay runs its operators on the same tensors.

    C functions are called directly, with the recorded addresses. The next call overwrites the result. Work that cannot
    be recorded, as when it depends on data other than by `kernels.choice.either`, is started again and never recorded.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorded = False
        """Whether the work is recorded, so that calls replay it."""
        self._work = work
        self._runs = 0
        self._calls: list[Callable[[int], Any]] = []
        """The recorded calls; each takes the number of threads."""
        self._blocks = Blocks()
        self._kept: list[Any] = []
        """Results of operators in other memory, kept alive because recorded calls hold their addresses."""
        self._before: list[tuple[Tensor, Tensor]] = []
        """While work is being recorded: tensors in other memory that operators have written to, and what they held."""

    def __call__(self) -> Any:
        if not self.recorded:
            self._runs += 1
            with torch.inference_mode(False), torch.no_grad():  # results are written with and without inference mode
                return self._record() if self._runs == RECORDED else self._work()
        threads = torch.get_num_threads()
        with torch.inference_mode():
            for call in self._calls:
                call(threads)
        return self._out

    def _record(self) -> Any:
        toolchain.recording.calls = self._calls
        try:
            with self:
                self._out = self._work()
            self.recorded = True
            return self._out
        except (DependsOnData, RuntimeError):  # an operator may not take tensors of a dispatch mode
            self._calls, self._blocks, self._kept = [], Blocks(), []
            for tensor, before in reversed(self._before):
                tensor.copy_(before)  # such as a state, which a step advances
        finally:
            toolchain.recording.calls, self._before = None, []
        return self._work()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        chosen = args[1] if function is torch.ops.aten.index.Tensor else ()  # shapes are fixed unless masks choose
        if WAITS & {*function.tags} and (not chosen or any(x is not None and x.dtype == torch.bool for x in chosen)):
            raise DependsOnData
        if function.namespace == "elastic":
            with self:
                return ops.on_cpu(function)(*args, **kwargs)
        self._before += [(x, x.clone()) for x in written(function, args, kwargs) if x not in self._blocks]
        out, calls = function(*args, **kwargs), toolchain.recording.calls
        assert calls is not None, "work is being recorded"
        if not any(isinstance(x, Tensor) for x in tree_leaves(out)):
            return out  # a type, for example
        is_new = not (function._schema.is_mutable or _is_view(out, tree_leaves((args, kwargs))))
        empty = "empty" in function.__name__
        if is_new:
            out = tree_map_only(Tensor, partial(self._in_a_block, empty), out)
        else:
            self._kept += [x for x in tree_leaves(out) if isinstance(x, Tensor) and x not in self._blocks]
        if not empty and (is_new or function._schema.is_mutable):
            args, kwargs, into = tree_map_only(Tensor, self._blocks.unheld, (args, kwargs, out))
            calls.append(_again(function, args, kwargs, into) if is_new else partial(_run, function, args, kwargs))
        return out

    def _in_a_block(self, empty: bool, x: Tensor) -> Tensor:
        """Return a result, which nothing was written to if `empty`, in memory that later results may get."""
        mine = self._blocks.like(x)
        return mine if empty else mine.copy_(x)


def _run(function: Any, args: Any, kwargs: Any, threads: int) -> None:
    function(*args, **kwargs)


def _is_view(out: Any, given: list[Any]) -> bool:
    """Return whether a result, or the first of several, shares memory with an argument."""
    first = out if isinstance(out, Tensor) else out[0]
    places = [x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor) and not x.is_mkldnn]
    return first.untyped_storage().data_ptr() in places


def _again(function: Any, args: Any, kwargs: Any, out: Any) -> Callable[[int], Any]:
    """Return a call that runs an operator again and writes its results over the first ones."""
    if not isinstance(out, Tensor):

        def run(threads: int) -> None:
            for old, new in zip(out, function(*args, **kwargs), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        return run
    if function in COPIES:
        return lambda threads: out.copy_(args[0])
    packet, takes = function._overloadpacket, [f"{x.type} {x.name}" for x in function._schema.arguments]
    for into in (getattr(packet, name) for name in packet.overloads()):
        if [f"{x.type} {x.name}" for x in into._schema.arguments] == [*takes, "Tensor out"]:
            with suppress(TypeError):
                name = packet.__name__  # torch.add takes 1.3 us where torch.ops.aten.add takes 5
                quick = getattr(torch, name, getattr(torch._C._nn, name, into))
                quick(*args, **kwargs, out=out)
                return lambda threads: quick(*args, **kwargs, out=out)
            return lambda threads: into(*args, **kwargs, out=out)
    return lambda threads: out.copy_(function(*args, **kwargs))
