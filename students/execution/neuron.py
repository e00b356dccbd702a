"""An MLP's activation function, behind which neurons that hardly answer are left out."""

from __future__ import annotations

from torch import Tensor, nn

from students.execution.block_context import BranchContext, Narrow
from students.execution.runtime import Runtime
from students.execution.wrapper import Named, Wrapper
from students.routers import ChannelRouter


class RoutedActivation(Wrapper):
    """The activation of an MLP's gate: where it stays below a neuron's limit, the rest of the neuron is left out.

    A token on its own hands on which neurons are open, and their activations alone: `up` then computes their rows and
    `down` reads their channels (see RoutedLinear.part). More tokens are masked, and all where no part of these
    layers can be read. block: the block's number.
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
        """The row of the batch that each token belongs to, where they are packed."""
        rows = self.branch.rows
        return None if rows is None else rows.queries // rows.shape[1]

    def _note(self, share: Tensor) -> None:
        """Record the share of neurons that are open; 0 for tokens that are not here."""
        rows = self.branch.rows
        if rows is not None:
            full = share.new_zeros(rows.shape.numel())
            share = full.index_copy_(0, rows.queries, share.flatten()).view(rows.shape)
        self.runtime.note(self.key, self.routers["neuron"].spec, share)
