"""The facts of one call of a student, and what a cache keeps for the calls that continue it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from students.execution.block_context import Narrow
from students.execution.flow import Flow
from students.execution.tokens import Order


@dataclass
class Memory:
    """What a key/value cache remembers of the prompt's decisions: while decoding, they stand."""

    scores: dict[str, Tensor] = field(default_factory=dict)
    """Of sequence-level routers [B, 1, N], by the key of their decisions."""
    narrow: dict[str, tuple[Narrow, Tensor]] = field(default_factory=dict)
    """Open channels and open gates of such routers, where they are left out for the whole batch alike."""
    held: Tensor | None = None
    """[B, L] bool, vision-language models: which places of the cache hold something to attend to; None: all."""
    next: Tensor | None = None
    """[..., B, 1], with `held`: the position of the next token."""

    def append(self, held: Tensor) -> None:
        """Add places [B, n] of the cache, each of which holds something or not."""
        self.held = held if self.held is None else torch.cat([self.held, held], 1)


@dataclass
class Call:
    """The facts of one call. They stand until the next one, for what is computed again during backward."""

    tokens: int = 0
    """How many tokens the call is for."""
    rows: Tensor | None = None
    """[B]: the offsets, where each row has its own."""
    skipping: bool = False
    """Whether this call skips and needs no gradients."""
    alone: bool = False
    """Whether it is also for one token only: then reading less is faster."""
    valid: Tensor | None = None
    """[B, T] bool: the tokens that are not padding; None: all."""
    padded: int = 0
    """How many tokens are padding."""
    order: Order | None = None
    """Of padded prompts in which every token sees all before it that are not padding, where a mask would be dear."""
    prompt: Tensor | None = None
    """[B, T] bool: the tokens from which sequence-level decisions are taken; None: all."""
    memory: Memory | None = None
    """Of the cache that the call continues, or fills."""
    flow: Flow | None = None
    """Image models: the tokens on their way through the blocks, where dropped ones stay away."""
