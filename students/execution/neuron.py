"""An MLP's activation function that closes neurons with small activations."""

from __future__ import annotations

from torch import Tensor, nn

from students.execution.block_context import BranchContext, Narrow
from students.execution.runtime import Runtime
from students.execution.wrapper import Named, Wrapper
from students.routers import ChannelRouter


class RoutedActivation(Wrapper):
    """The activation of an MLP's gate; a neuron is closed where the magnitude stays below the neuron's limit.

    For a token on its own, the activations of open neurons only are returned and their indices passed on: `up` computes
    only their rows and `down` reads only their channels (see RoutedLinear.part). Where there are more tokens, or these
    layers cannot be read in part (opaque), closed neurons are masked. block: index of the block.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        runtime: Runtime,
        router: ChannelRouter,
        block: int,
        branch: BranchContext,
        *,
        opaque: bool,
    ) -> None:
        super().__init__(base_layer, runtime)
        self.routers = Named[ChannelRouter]({"neuron": router})
        self.key = f"{block}.mlp.neuron"
        self.branch = branch
        self.opaque = opaque

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        if self.runtime.bypass:
            return out
        out, share = self.routers["neuron"].read(out, self.runtime.dial_of(x, self._owner()))
        self._note(share)
        self.branch.narrow = None
        if self.opaque or not (self.runtime.call.alone and x.shape[:-1].numel() == 1):
            return out
        open_ = out.flatten().nonzero().squeeze(1)
        self.branch.narrow = Narrow(open_, out.shape[-1], weight=None, keep=False)
        return out.index_select(-1, open_)

    def _owner(self) -> Tensor | None:
        """Return the row of the batch that each token belongs to; None unless tokens are packed."""
        rows = self.branch.rows
        return None if rows is None else rows.queries // rows.shape[1]

    def _note(self, share: Tensor) -> None:
        """Record the share of open neurons; 0 for tokens that the MLP does not run on."""
        rows = self.branch.rows
        if rows is not None:
            full = share.new_zeros(rows.shape.numel())
            share = full.index_copy_(0, rows.queries, share.flatten()).view(rows.shape)
        self.runtime.note(self.key, self.routers["neuron"].spec, share)
