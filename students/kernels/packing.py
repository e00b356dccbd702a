"""Frozen linear layers whose weight is laid out once for this CPU's matrix products, instead of in every call.

In bfloat16 on a CPU, torch hands a linear layer to oneDNN, which copies the weight into blocks before it multiplies,
however few rows there are. A weight that never changes can be copied once. The products are the same, bit for bit; the
price is a second copy of the weights in memory. (For fewer outputs than a vector holds they need not be the same: some
CPUs, such as AMD's with AVX-512 and no AMX, then sum in another order.)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.kernels import ops
from students.kernels.stand_in import exchange, stand_in
from students.prepared import Stamp

MOST_ROWS = 256
"""For more of them packing a weight costs little beside the product, which then likes its own blocks better."""

LEAST_OUTPUTS = 32
"""For fewer of them, which never takes long, the order of sums can be another one."""


class PackedProduct:
    """F.linear for one frozen weight [O, I] that `prepare` has packed as it is now.

    F.linear itself runs where it has not, on many rows, for few outputs, where gradients are wanted, elsewhere than in
    bfloat16 on a CPU, and where somebody counts operations or compiles them.
    """

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._stamp = Stamp()

    def prepare(self, weight: Tensor) -> None:
        """Pack the weight, where it can be and has not been as it is now."""
        if self._stamp.renew([weight]):
            self._packed = None
            if _can_be_packed(weight):
                self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), MOST_ROWS)

    def holds(self, weight: Tensor) -> bool:
        """Whether this weight is packed as it is now."""
        return self._packed is not None and self._stamp.holds([weight])

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if (
            self._packed is None
            or torch.is_grad_enabled()
            or x.dtype != torch.bfloat16
            or x.numel() > MOST_ROWS * x.shape[-1]
            or ops.observed()
            or not self._stamp.holds([weight])
        ):
            return F.linear(x, weight, bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, bias, "none", [], "")
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedProduct:
        return PackedProduct()  # what is packed cannot be copied


class PackedLinear(nn.Linear):
    """In place of a frozen linear layer [..., I] -> [..., O]: keeps the packed weight beside its parameters."""

    def __init__(self, plain: nn.Linear) -> None:
        stand_in(self, plain)
        self.product = PackedProduct()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


def pack_linears(model: nn.Module) -> bool:
    """Let a model's frozen bfloat16 linear layers have packed weights, which Student.prepare makes, or prepare_linears;
    False where none can."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    linears = [x for x in model.modules() if type(x) is nn.Linear and _can_be_packed(x.weight)]
    exchange(model, {linear: PackedLinear(linear) for linear in linears})
    return bool(linears)


@torch.no_grad()
def prepare_linears(model: nn.Module, but: Collection[nn.Module] = ()) -> None:
    """Pack the weights of a model's linear layers that may have packed ones, `but` those of some."""
    for module in model.modules():
        if isinstance(module, PackedLinear) and module not in but:
            module.product.prepare(module.weight)


def _can_be_packed(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter)  # and not quantized
    return plain and weight.dtype == torch.bfloat16 and weight.is_cpu and len(weight) >= LEAST_OUTPUTS
