"""Facts about one call of a student, the tokens of images on their way, and decisions that a cache keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from students.execution.block_context import Narrow
from students.execution.patch_counts import SoFar
from students.execution.tokens import Order
from students.kernels.key_bias import key_mask
from students.kernels.merging import at


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
class Flow:
    """The tokens of a batch of images on their way through the blocks, where some stay away once they are dropped."""

    tokens: int
    """Number of tokens that each image started with."""
    score: Tensor | None = None
    """The lowest score [B, n] so far of each remaining token."""
    left: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    """For each drop: (tokens [B, n, D] before it, flat indices of those that went on, new places [B, n] of all where
    patches merge)."""
    places: Tensor | None = None
    """Original index [B, n] of each remaining token; None: all tokens remain."""
    valid: Tensor | None = None
    """[B, n] bool: which entries are tokens and not filling; None: all."""
    kept: Tensor | None = None
    """For mask execution: gates [B, T], 1 for remaining tokens; None: all remain."""
    size: Tensor | None = None
    """Number of patches [B, n] that each token stands for, where patches merge; None: one each."""
    stand_in: Tensor | None = None
    """For mask execution: index [B, T] of the token that each token has been merged into; None: itself."""
    so_far: SoFar = field(default_factory=list)
    """What earlier blocks have rounded away (see PatchCounts.after)."""

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """Return the additive attention mask [B, 1, n, n], the logarithm of each key's size; None: all are 1."""
        return None if self.size is None else key_mask(self.size, dtype)

    def back(self, x: Tensor) -> Tensor:
        """Return all tokens [B, T, D]: a dropped token as it was when dropped, or as the token that it merged into."""
        for before, rows, stand_in in reversed(self.left):
            x = before.flatten(0, 1).index_copy(0, rows, x.flatten(0, 1)).view_as(before)
            if stand_in is not None:
                x = at(x, stand_in)
        return x


@dataclass
class Call:
    """Facts about one call, kept until the next call, because recomputation in backward reads them again."""

    tokens: int = 0
    """Number of tokens in the batch; 0 where it does not matter."""
    batch: int = 1
    """Number of rows of the batch."""
    rows: Tensor | None = None
    """Offsets [B] of the dial if each row has its own; None: all rows share one."""
    skipping: bool = False
    """Whether closed parts are skipped and no gradients are recorded."""
    alone: bool = False
    """Whether the call is `skipping` and for one token only: reading fewer weights is then faster."""
    fixed: bool = False
    """Whether the call is a step of fixed shape (recording/step.py), in which no shape may depend on what is open."""
    asks: bool = False
    """Whether such a step asks if its only token is open (`kernels.choice.either`): on CPUs, where that is quick."""
    valid: Tensor | None = None
    """[B, T] bool: the tokens that are not padding; None: all."""
    padded: int = 0
    """Number of padding tokens."""
    order: Order | None = None
    """Padded causal prompts on a GPU: the order with padding behind the other tokens, where attention needs no mask."""
    position: Tensor | None = None
    """[1 or B, T]: the position of each token in its sequence, padding not counted; None: no router asks for it."""
    prompt: Tensor | None = None
    """[B, T] bool: the tokens that sequence-level decisions are taken from; None: all."""
    memory: Memory | None = None
    """Memory of the cache that the call continues or fills; None without a cache."""
    flow: Flow | None = None
    """Image models whose dropped tokens stay away: the tokens on their way through the blocks."""
