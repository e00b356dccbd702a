"""The product of an MLP's gate and up, whose gradient is computed by the linear layer that reads the product."""

from __future__ import annotations

import torch
from torch import nn

from students.architectures import Architecture
from students.execution.linear import RoutedLinear
from students.kernels.deferred import ACTIVATIONS


def join_product(block: nn.Module, record: Architecture) -> None:
    """Let the MLP's last linear layer compute the gradients of gate and up, if it has a channel router.

    The model still multiplies activation(gate) by up, but without recording a gradient. Backward then needs only the
    outputs of gate and up; torch would also keep the activation and the product (see autograd.GatedChannelGate).
    """
    if len(record.mlp_in) != 2:
        return
    names = (name for site in ("mlp_in", "mlp_out") for name in record.linears(site))
    routed = [layer for layer in map(block.get_submodule, names) if isinstance(layer, RoutedLinear)]
    if len(routed) != 3 or "channel" not in routed[2].routers:
        return
    gate, up, behind = routed
    static = behind.routers["channel"].spec.network == "static"
    kind = _kind_of(block.get_submodule(f"{record.mlp}.{record.activation}"))
    gate.group.gates = kind is not None and behind.selects
    if kind is not None and not (static or behind.part or behind.lora is not None):
        behind.activation = kind
        gate.multiplies = up.multiplies = True


@torch.no_grad()
def _kind_of(activation: nn.Module) -> int | None:
    x = torch.linspace(-6, 6, 97)
    found = activation(x)
    known = (function(x, **options) for function, options in ACTIVATIONS)
    return next((kind for kind, y in enumerate(known) if torch.equal(y, found)), None)
