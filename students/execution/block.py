"""A language model's block that runs on the tokens its layer router lets through."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from students.execution.block_context import BlockContext, Exits, Gathered
from students.execution.branch import RoutedBranch
from students.execution.gates import Gates
from students.execution.tokens import place_tokens, take
from students.routers import Router


class BlockGather:
    """Hooks that let a language model's block run on the tokens that its layer router lets through, and on no others.

    For routers whose closed tokens write no key and get no substitute: then norms and additions to the residual stream
    shrink with the rest. attn: the branch that the router stands in front of; norm: the one in front of both.
    context: the block's.
    """

    def __init__(
        self, block: nn.Module, attn: RoutedBranch, router: Router, norm: nn.Module | None, context: BlockContext
    ) -> None:
        self._attn = attn
        self._router = router
        self._norm = norm
        self._context = context
        block.register_forward_pre_hook(self._gather, with_kwargs=True)
        block.register_forward_hook(self._scatter, prepend=True, always_call=True)

    def _gather(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attn, router, run = self._attn, self._router, self._attn.runtime
        self._context.gathered = None
        if run.bypass or not run.skips([router.spec]):
            return None
        x, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        features = F.rms_norm(x, x.shape[-1:]) if self._norm is None else self._norm(x)
        gates = run.decide(router.spec.of_kind.key(attn.block, attn.branch), router, features)
        chosen = Exits(x, [(gates, None)], valid=run.call.valid).chosen(run.counted(x))
        chosen.begin()
        filled, kwargs = chosen.filled(x), {k: v for k, v in kwargs.items() if k != "hidden_states"}
        placed = place_tokens(chosen, kwargs)
        some = chosen.cut(filled)  # here, or a line above, the host waits, if it is not known how many there are
        exits = Exits(x, specs=[router.spec])
        if exits.weighted:
            gate = take(gates.gate, x, chosen.rows)
            exits.gates = [(Gates(x.dtype, gate=gate), None)]
        self._context.gathered = Gathered(x, chosen, exits, placed)
        return [some, *rest], kwargs

    def _scatter(self, block: nn.Module, args: Any, out: Any) -> Any:
        gathered = self._context.gathered
        if not (block.training and torch.is_grad_enabled()):  # else backward computes the block again, without hooks
            self._context.gathered = None
        if gathered is None or out is None:  # out is None where the block failed
            return None
        args[0] = gathered.x  # as other hooks, such as transformers' for hidden states, expect it
        some = out[0] if isinstance(out, tuple) else out
        full = gathered.x.flatten(0, 1).index_copy(0, gathered.chosen.rows, some.squeeze(0)).view_as(gathered.x)
        return (full, *out[1:]) if isinstance(out, tuple) else full
