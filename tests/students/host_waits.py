"""A dispatch mode in which whatever makes the host wait for the device is an error: what passes can be recorded."""

from __future__ import annotations

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
"""Operators that read numbers from the device, or whose results have shapes that depend on them; and the one by which
Python's numbers become tensors (torch.tensor), which on a GPU are copied there from memory of the host."""
MASKED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
"""Operators that do where an index is boolean."""


READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.__bool__}
"""Functions that read a tensor, of which some read memory of a CPU with no operator."""


class HostWait(AssertionError):
    """Something waited."""


class _NoReads(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            raise HostWait(f"{function.__name__} waits for the device")
        return function(*args, **(kwargs or {}))


class NoHostWaits(TorchDispatchMode):
    """Raises HostWait at what would wait for a device, whatever device it runs on."""

    def __enter__(self) -> NoHostWaits:
        self._reads = _NoReads()
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = function.overloadpacket
        indices = args[1] if packet in MASKED else ()
        boolean = any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)
        repeats = packet is _aten.repeat_interleave and function._overloadname != "self_int"
        if packet in WAITS or boolean or (repeats and kwargs.get("output_size") is None):
            raise HostWait(f"{function} waits for the device")
        return function(*args, **kwargs)
