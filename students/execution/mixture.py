"""The experts of a mixture, of which those with a small routing weight are closed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward

from students.execution.block_context import BlockContext, BranchContext, Rows
from students.execution.runtime import Runtime
from students.execution.wrapper import Named, Wrapper
from students.routers import ChannelRouter


class WithMixture(Wrapper):
    """A dense MLP together with the mixture beside it, so that the gates of the MLP are those of both.

    mixture: its wrapper. context: state of the MLP.
    """

    def __init__(self, base_layer: nn.Module, runtime: Runtime, mixture: HeldMixture, context: BranchContext) -> None:
        super().__init__(base_layer, runtime)
        self.context = context
        self._mixture = (mixture,)  # no module of this one: the block has it

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the two for x [B, T, D]."""
        out: Tensor = self._mixture[0].base_layer(x) + self.base_layer(x)
        self.context.zeroed = False
        return out


class HeldMixture(Wrapper):
    """A mixture whose block calls it in front of the MLP beside it and adds the two: it runs in a WithMixture."""

    def forward(self, x: Tensor) -> float:
        return 0.0


class RoutedExperts(Wrapper):
    """A mixture's experts; of those that the model's router has chosen for a token, one is closed where its routing
    weight stays below the expert's limit.

    Where gates are skipped, a closed expert's number becomes that of an expert elsewhere, as in expert parallelism:
    transformers' `grouped_mm` then computes no product for it, without the host waiting. It runs in place of other
    implementations: `batched_mm`, to which transformers switches for decoding on GPUs, would compute it all the same,
    and gpt-oss's own would fail. Experts beside a dense MLP are closed, too, for a token that skips this MLP. router:
    None if these gates are all. block: index of the block. context: state of the block.
    """

    def __init__(
        self, base_layer: nn.Module, runtime: Runtime, router: ChannelRouter | None, block: int, context: BlockContext
    ) -> None:
        super().__init__(base_layer, runtime)
        self.routers = Named[ChannelRouter]({} if router is None else {"mixture": router})
        self.key = f"{block}.mlp.mixture"
        self.context = context

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum [N, D] of experts for x [N, D]; index, weights [N, k]: what the model's router has
        chosen."""
        base: Any = self.base_layer
        run, compute = self.runtime, base
        router = self.routers.get("mixture")
        if router is not None and not run.bypass:
            every = weights.new_zeros(len(x), len(router.log_limit)).scatter(1, index, weights)
            every, share = router.read(every, run.dial_of(every, self._owner(len(x))))
            self._note(router, (share * (every.shape[1] / index.shape[1])).clamp(max=1))
            weights = every.gather(1, index)
        skips = run.call.skipping and not run.bypass
        if skips:
            closed, exits = weights == 0, self.context.mlp.exit
            if exits is not None and exits.gates and not exits.all_open:
                closed = closed | ~exits.open().view(-1, 1)
            index = index.masked_fill(closed, base.num_experts)
            compute = partial(grouped_mm_experts_forward, base)
        base._is_expert_parallel = skips
        out: Tensor = compute(x, index, weights)
        return out

    @property
    def _rows(self) -> Rows | None:
        """The tokens that the experts are called with; None: all of the batch."""
        gathered, rows = self.context.gathered, self.context.mlp.rows
        if rows is None and gathered is not None:
            return Rows(gathered.chosen.rows, gathered.chosen, gathered.x.shape[:2])
        return rows

    def _owner(self, tokens: int) -> Tensor | None:
        """Return the row of the batch that each of the tokens belongs to; None if all rows share one offset."""
        offsets, rows = self.runtime.call.rows, self._rows
        if offsets is None:
            return None
        if rows is None:
            return torch.arange(tokens, device=offsets.device) // (tokens // len(offsets))
        return rows.queries // rows.shape[1]

    def _note(self, router: ChannelRouter, share: Tensor) -> None:
        """Record the share [N] of open experts; 0 for tokens that they are not called with."""
        run, rows = self.runtime, self._rows
        if run.decisions is None:
            return
        share = share.view(run.call.batch, -1) if rows is None else rows.whole(share, rows.queries)
        run.note(self.key, router.spec, share)
