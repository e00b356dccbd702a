"""A language model's block that runs on the tokens its layer router lets through."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from students.execution.block_context import BlockContext, Exits, Gates, Gathered
from students.execution.branch import RoutedBranch
from students.execution.tokens import place_tokens, take
from students.routers import Router


class BlockGather:
    """Hooks that run a language model's block on the open tokens of its layer router only.

    For routers whose closed tokens write no keys and get no substitute: norms and residual additions then run on fewer
    tokens too. attn: the attention branch, which holds the router; norm: the norm in front of attention (None in
    post-norm models: the router then reads the input divided by its root mean square); context: the block's; scale: the
    name of the buffer by which the block multiplies all tokens, if it does.
    """

    def __init__(
        self,
        block: nn.Module,
        attn: RoutedBranch,
        router: Router,
        norm: nn.Module | None,
        context: BlockContext,
        scale: str | None,
    ) -> None:
        self._attn = attn
        self._router = router
        self._norm = norm
        self._context = context
        self._scale = scale
        block.register_forward_pre_hook(self._gather, with_kwargs=True)
        block.register_forward_hook(self._scatter, prepend=True, always_call=True)

    def _gather(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attn, router, run = self._attn, self._router, self._attn.runtime
        self._context.gathered = None
        if run.bypass or run.call.fixed or not run.skips([router.spec]):
            return None
        x, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        features = F.rms_norm(x, x.shape[-1:]) if self._norm is None else self._norm(x)
        gates = run.decide(router.spec.of_kind.key(attn.block, attn.branch), router, features)
        chosen = Exits(x, [(gates, None)], valid=run.call.valid, room=run.room).chosen(run.counted(x))
        chosen.begin()
        filled, kwargs = chosen.filled(x), {k: v for k, v in kwargs.items() if k != "hidden_states"}
        placed = place_tokens(chosen, kwargs, attn.reads_positions)
        some = chosen.cut(filled)  # the host waits here, or in the line above, unless it knows the number of tokens
        exits = Exits(x, specs=[router.spec])
        if exits.weighted:
            gate = take(gates.gate, x, chosen.rows)
            exits.gates = [(Gates(x.dtype, gate=gate), None)]
        self._context.gathered = Gathered(x, chosen, exits, placed)
        return [some, *rest], kwargs

    def _scatter(self, block: nn.Module, args: Any, out: Any) -> Any:
        gathered = self._context.gathered
        if not (block.training and torch.is_grad_enabled()):  # else checkpointing runs forward again, without hooks
            self._context.gathered = None
        if gathered is None or out is None:  # out is None where the block failed
            return None
        args[0] = gathered.x  # hooks that run later, such as transformers' for hidden states, expect all tokens
        some = out[0] if isinstance(out, tuple) else out
        rest = gathered.x if self._scale is None else gathered.x * block.get_buffer(self._scale)
        full = gathered.chosen.scatter(some.squeeze(0), rest.flatten(0, 1)).view_as(gathered.x)
        return (full, *out[1:]) if isinstance(out, tuple) else full
