"""FLOPs and bytes read by the matrix products of a forward pass, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from students.flops import ATTENTION, flop_counter, grouped_bytes, other_products
from students.kernels.ops import OPERATORS

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.mv, *ATTENTION}


class _ByteCounter(TorchDispatchMode):
    """Dispatch mode that counts the bytes of all operands that matrix products read."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.products = {*_PRODUCTS, *other_products()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet is _aten._grouped_mm:
            self.total += grouped_bytes(*args)
        elif packet in self.products:
            self.total += sum(x.nbytes for x in args if isinstance(x, Tensor))
        elif function.namespace == "elastic":
            read = OPERATORS[packet.__name__].read
            self.total += 0 if read is None else read(*args, out_val=out)
        return out


@torch.no_grad()
def count(work: Callable[[], object]) -> tuple[int, int]:
    """Return (FLOPs, bytes read) of the matrix products in `work()`."""
    with _ByteCounter() as read, flop_counter() as flops:  # the latter decomposes composite operators into products
        work()
    return flops.get_total_flops(), read.total
