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
    only their rows and `down` reads only their channels (see RoutedLinear.part). In a step of fixed shape both find out
    on the device. Where there are more tokens, or these layers cannot be read in part (opaque), closed neurons are
    masked. block: index of the block.
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
        run, rows, router = self.runtime, self.branch.rows, self.routers["neuron"]
        if run.bypass:
            return out
        out, share = router.read(out, run.dial_of(x, None if rows is None else rows.queries // rows.shape[1]))
        run.note(self.key, router.spec, share if rows is None else rows.whole(share, rows.queries))
        self.branch.narrow = None
        if self.opaque or not (run.call.alone and x.shape[:-1].numel() == 1):
            return out
        if run.call.fixed:
            self.branch.open_parts = (out != 0).flatten()
            return out
        open_ = out.flatten().nonzero().squeeze(1)
        self.branch.narrow = Narrow(open_, out.shape[-1], weight=None, keep=False)
        return out.index_select(-1, open_)
