"""Work on a CPU that is recorded once and replayed as a list of calls: for one token, operators take microseconds, and
the Python modules around them as long again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from students.kernels import ops
from students.kernels.cpu import toolchain

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operators that return numbers or shapes that depend on data."""


class DependsOnData(Exception):
    """Raised when work that is being recorded reads a number or shape that a replay could not update."""


RECORDED = 8
"""Number of the run that is recorded. Recording costs about as much as so many replays save; earlier runs make what is
made only once."""


class Replay(TorchDispatchMode):
    """A recorder for CPUs: work on tensors that stay where they are; a replay runs its operators on the same tensors.

    C functions are called directly, with the recorded addresses. The next call overwrites the result. Work that turns
    out to depend on data, other than by `kernels.choice.either`, is started again and never recorded.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorded = False
        """Whether the work is recorded, so that calls replay it."""
        self._work = work
        self._runs = 0
        self._calls: list[Callable[[int], Any]] = []
        """The recorded calls; each takes the number of threads."""
        self._kept: list[Any] = []
        """Results of operators, kept alive because recorded calls hold their addresses."""

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
        except DependsOnData:
            pass
        finally:
            toolchain.recording.calls = None
        return self._work()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        chosen = args[1] if function is torch.ops.aten.index.Tensor else ()  # shapes are fixed unless masks choose
        if WAITS & {*function.tags} and (not chosen or any(x is not None and x.dtype == torch.bool for x in chosen)):
            raise DependsOnData
        if function.namespace == "elastic":
            with self:
                return ops.on_cpu(function)(*args, **kwargs)
        out = function(*args, **kwargs)
        self._kept.append(out)
        calls = toolchain.recording.calls
        assert calls is not None, "work is being recorded"
        if function._schema.is_mutable:
            calls.append(lambda threads: function(*args, **kwargs))
        elif "empty" not in function.__name__ and not _is_view(out, tree_leaves((args, kwargs))):
            calls.append(_again(function, args, kwargs, out))
        return out


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
