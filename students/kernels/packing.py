"""Copies of frozen weights that make products faster: packed for this CPU, or with a low-rank correction added.

In bfloat16 on a CPU, torch hands a linear layer to oneDNN, which copies the weight into blocks before it multiplies,
however few rows the input has. A weight that never changes can be copied once. The products are the same, bit for bit;
the cost is a second copy of the weights in memory. (With fewer outputs than a vector register holds, products may
differ: some CPUs, such as AMD's with AVX-512 and no AMX, then sum in another order.)

The sum of a weight and its correction takes one product, on any device, where both apart take three.
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
"""Maximum rows of the input of a packed product. With more rows, packing costs little beside the product, and oneDNN is
faster with blocks of its own choice."""

LEAST_OUTPUTS = 32
"""Minimum outputs of a packed layer. With fewer outputs, which never take long, the order of summation may differ."""


class PackedProduct:
    """F.linear for one frozen weight [O, I], computed with the packed copy that `prepare` has made.

    F.linear itself runs if there is no packed copy or the weight has changed since, on many rows, for few outputs, with
    gradients enabled, in any other dtype or on any other device than bfloat16 on a CPU, and where operations are
    counted or compiled.
    """

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._stamp = Stamp()

    def prepare(self, weight: Tensor) -> None:
        """Pack the weight if it can be packed and has changed since it was packed last."""
        if self._stamp.renew([weight]):
            self._packed = _packed(weight) if _can_be_packed(weight) else None

    def holds(self, weight: Tensor) -> bool:
        """Return whether there is a packed copy of this weight's current values."""
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
        return _product(x, self._packed, bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedProduct:
        return PackedProduct()  # a packed weight cannot be copied


class CorrectedProduct:
    """The product with one frozen weight [O, I] and its low-rank correction together: with their sum, rounded to the
    weight's type, in place of three products, of which the two thin ones take long for what they do. The sum is packed
    if the weight can be packed."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._packed = False
        self._stamp = Stamp()

    def prepare(self, weight: Tensor, down: Tensor, up: Tensor) -> None:
        """Compute weight [O, I] + up [O, r] @ down [r, I] if one of them has changed since the last time."""
        if self._stamp.renew([weight, down, up]):
            whole = (weight.float() + up.float() @ down.float()).to(weight.dtype).contiguous()
            self._packed = _can_be_packed(weight)
            self._sum = _packed(whole) if self._packed else whole

    def __call__(self, x: Tensor, bias: Tensor | None, *made_of: Tensor) -> Tensor | None:
        """Return the product [..., O] with x [..., I]; made_of: as given to `prepare`. None where there is no sum of
        these, in another dtype, and where operations are counted or compiled."""
        if self._sum is None or x.dtype != made_of[0].dtype or ops.observed() or not self._stamp.holds(made_of):
            return None
        return _product(x, self._sum, bias) if self._packed else F.linear(x, self._sum, bias)

    def plain(self, *made_of: Tensor) -> Tensor | None:
        """Return the sum [O, I] for products of other kinds; None where `__call__` returns None, or if it is packed."""
        usable = not (self._packed or ops.observed()) and self._stamp.holds(made_of)
        return self._sum if usable else None

    def __deepcopy__(self, memo: dict[int, Any]) -> CorrectedProduct:
        return CorrectedProduct()


class PackedLinear(nn.Linear):
    """Stands in for a frozen linear layer [..., I] -> [..., O] and holds the packed weight beside its parameters."""

    def __init__(self, plain: nn.Linear) -> None:
        stand_in(self, plain)
        self.product = PackedProduct()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


def pack_linears(model: nn.Module) -> bool:
    """Replace a model's frozen bfloat16 linear layers with PackedLinear; Student.prepare or `prepare_linears` then
    packs the weights. Return False if no layer can be packed."""
    linears = [x for x in model.modules() if type(x) is nn.Linear and _can_be_packed(x.weight)]
    exchange(model, {linear: PackedLinear(linear) for linear in linears})
    return bool(linears)


@torch.no_grad()
def prepare_linears(model: nn.Module, but: Collection[nn.Module] = ()) -> None:
    """Pack the weights of all PackedLinear layers of a model but those in `but`."""
    for module in model.modules():
        if isinstance(module, PackedLinear) and module not in but:
            module.product.prepare(module.weight)


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), MOST_ROWS)
    return packed


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return out


def _can_be_packed(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter)  # quantized weights have other types
    fits = plain and weight.dtype == torch.bfloat16 and weight.is_cpu and len(weight) >= LEAST_OUTPUTS
    return fits and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
