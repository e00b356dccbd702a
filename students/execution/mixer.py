"""What hybrid models have in place of attention, where image tokens that stay outside are masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from students.architectures.lookup import record_in
from students.architectures.record import Architecture
from students.execution.runtime import Runtime
from students.execution.wrapper import Wrapper
from students.libraries import cache_in


class GatedMixer(Wrapper):
    """Linear attention or a short convolution whose mask may be gates [B, T] of tokens, of a floating type.

    Zeros in the middle of a sequence do not leave a token out: the state decays over them, and a convolution reaches
    less far back. Closed tokens are therefore moved behind all others, where they see the state and no token sees them.
    A cache keeps the state of the last token; with one they go to the front, as zeros, which leave an empty state
    empty.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.runtime.bypass or attention_mask is None or not attention_mask.is_floating_point():
            whole: Tensor = self.base_layer(hidden_states, attention_mask=attention_mask, **kwargs)
            return whole
        gate, closed = attention_mask, attention_mask == 0
        if cache_in(kwargs) is None:
            gate, last = gate.masked_fill(closed, 1), closed
        else:
            last = ~closed
        x = hidden_states * gate.unsqueeze(-1).to(hidden_states.dtype)
        order = last.byte().argsort(dim=1, stable=True).unsqueeze(-1).expand_as(x)
        out: Tensor = self.base_layer(x.gather(1, order), attention_mask=None, **kwargs)
        return torch.zeros_like(out).scatter(1, order, out)


def gate_mixers(record: Architecture, blocks: list[nn.Module], runtime: Runtime) -> None:
    """Wrap what blocks of a hybrid model have in place of attention in GatedMixers."""
    for block in blocks:
        own = record_in(record, block)
        if not own.attn_in:
            setattr(block, own.attn, GatedMixer(block.get_submodule(own.attn), runtime))
