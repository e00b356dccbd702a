"""Dispatch modes that refuse or count whatever makes the host wait for the device, on any device.

Work that never waits can be recorded as a CUDA graph."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
WAITS = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.nonzero_static,
    _aten.masked_select,
    _aten.unique_consecutive,
    _aten._unique,
    _aten._unique2,
    _aten.unique_dim,
    _aten.bincount,
    _aten.equal,
    _aten.is_nonzero,
    _aten.item,
    _aten.lift_fresh,
}
"""Operators that read numbers from the device, or whose results' shapes depend on such numbers; and `lift_fresh`, the
operator of torch.tensor, which for a GPU copies Python numbers from host memory."""
MASKED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
"""Operators that wait if one of their indices is boolean."""


FREE = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten._unsafe_view, _aten.detach}
"""Operators, other than views, that launch no kernel."""
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.__bool__}
"""Functions that read a tensor's values on the host; some read a CPU tensor's memory without calling an operator."""


class HostWait(AssertionError):
    """Raised by an operator or function that would make the host wait for the device."""


class _NoReads(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            raise HostWait(f"{function.__name__} waits for the device")
        return function(*args, **(kwargs or {}))


def waits(function: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an operator, called with these arguments on a GPU, makes the host wait for it."""
    packet = function.overloadpacket
    indices = args[1] if packet in MASKED else ()
    boolean = any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)
    repeats = packet is _aten.repeat_interleave and function._overloadname != "self_int"
    return packet in WAITS or boolean or (repeats and kwargs.get("output_size") is None)


class _Watch(TorchDispatchMode):
    """A dispatch mode that enters a function mode with itself, to see functions that read a tensor with no operator."""

    def reads(self) -> TorchFunctionMode:
        """Return the function mode to enter."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        self._reads = self.reads()
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)


class NoHostWaits(_Watch):
    """A mode in which whatever would wait for a device raises HostWait, on any device."""

    def reads(self) -> TorchFunctionMode:
        return _NoReads()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(function, args, kwargs):
            raise HostWait(f"{function} waits for the device")
        return function(*args, **kwargs)


class _CountReads(TorchFunctionMode):
    def __init__(self, counter: Launches) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self._counter.waits)
        out = function(*args, **(kwargs or {}))
        if function in READS and len(self._counter.waits) == before:  # no operator has counted the wait
            self._counter.waits.append(function.__name__)
        return out


class Launches(_Watch):
    """A mode that counts operators that would launch a kernel on a GPU (`launched`) and waits of the host (`waits`)."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.waits: list[str] = []

    def reads(self) -> TorchFunctionMode:
        return _CountReads(self)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        nothing = function.overloadpacket is _aten.lift_fresh and not args[0].numel()  # an empty cache
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if waits(function, args, kwargs) and not nothing:
            self.waits.append(str(function))
        elif function.overloadpacket not in FREE and not view:
            self.launched[str(function)] += 1
        return function(*args, **kwargs)
