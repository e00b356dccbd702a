"""An MLP's activation function, whose product with `up` is one launch where launches and memory are what costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from students.execution.runtime import Runtime
from students.execution.wrapper import Wrapper
from students.kernels import devices, ops
from students.kernels.deferred import ACTIVATIONS, activated


class FusedActivation(Wrapper):
    """The activation of an MLP's gate, deferred until it is multiplied by `up`, while closed tokens are skipped on a
    device that the host runs ahead of. kind: number of the activation, as in `ACTIVATIONS`."""

    def __init__(self, base_layer: nn.Module, runtime: Runtime, kind: int) -> None:
        super().__init__(base_layer, runtime)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        run, plain = self.runtime, type(x) is Tensor and not torch.compiler.is_compiling()
        if plain and run.call.skipping and not run.bypass and devices.runs_ahead(x.device) and ops.compiled(x):
            return activated(x, self.kind)
        out: Tensor = self.base_layer(x)
        return out


@torch.no_grad()
def kind_of(activation: nn.Module) -> int | None:
    """Return the number in `ACTIVATIONS` of the function that an activation computes; None if it is not among them."""
    x = torch.linspace(-6, 6, 97)
    found = activation(x)
    known = (function(x, **options) for function, options in ACTIVATIONS)
    return next((kind for kind, y in enumerate(known) if torch.equal(y, found)), None)
