"""Facts about one call of a student, and the prompt's decisions that a cache keeps for the calls that continue it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from students.execution.block_context import Narrow
from students.execution.flow import Flow
from students.execution.tokens import Order


@dataclass
class Memory:
    """Decisions taken from the prompt, kept with the key/value cache and used unchanged while decoding."""

    scores: dict[str, Tensor] = field(default_factory=dict)
    """Scores [B, 1, N] of sequence-level routers, by the key of their decisions."""
    narrow: dict[str, tuple[Narrow, Tensor]] = field(default_factory=dict)
    """Open channels and indices of open gates of sequence-level routers, where the whole batch shares them."""
    held: Tensor | None = None
    """Vision-language models: [B, L] bool, which slots of the cache hold a token to attend to; None: all."""
    next: Tensor | None = None
    """Position [..., B, 1] of the next token; set together with `held`."""
    places: Tensor | None = None
    """Models with sliding windows: [B, L], the column of the whole input that each slot's token came from."""

    def append(self, held: Tensor, places: Tensor | None) -> None:
        """Append n slots of the cache; held [B, n] bool: which of them hold a token to attend to; places [B, n]: the
        columns of this call's input that they came from, where that matters."""
        self.held = held if self.held is None else torch.cat([self.held, held], 1)
        if places is not None:
            before = self.places
            self.places = places if before is None else torch.cat([before, places + before.amax() + 1], 1)


@dataclass
class Call:
    """Facts about one call, kept until the next call, because recomputation in backward reads them again."""

    tokens: int = 0
    """Number of tokens in the batch; 0 where it does not matter."""
    rows: Tensor | None = None
    """Offsets [B] of the dial if each row has its own; None: all rows share one."""
    skipping: bool = False
    """Whether closed parts are skipped and no gradients are recorded."""
    alone: bool = False
    """Whether the call is `skipping` and for one token only: reading fewer weights is then faster."""
    valid: Tensor | None = None
    """[B, T] bool: the tokens that are not padding; None: all."""
    padded: int = 0
    """Number of padding tokens."""
    order: Order | None = None
    """Padded causal prompts on a GPU: the order with padding behind the other tokens, where attention needs no mask."""
    prompt: Tensor | None = None
    """[B, T] bool: the tokens that sequence-level decisions are taken from; None: all."""
    memory: Memory | None = None
    """Memory of the cache that the call continues or fills; None without a cache."""
    flow: Flow | None = None
    """Image models whose dropped tokens stay away: the tokens on their way through the blocks."""
