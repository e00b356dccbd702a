"""Pruning of image tokens in front of a language model: the router's module, masks and positions of pruned prompts."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from einops import repeat
from torch import Tensor, nn

from students.execution.prompt import Prompted, PromptPruning, Room
from students.execution.wrapper import Named
from students.libraries import cache_in
from students.routers import ImageRouter, selection

if TYPE_CHECKING:
    from students.families.vision_language import VisionLanguageStudent


class PruningPoint(nn.Module):
    """Holds the router of image tokens inside the language model, called `door` in the names of saved parameters."""

    def __init__(self, router: ImageRouter) -> None:
        super().__init__()
        self.routers = Named[ImageRouter]({"image": router})


class StudentPruning(PromptPruning):
    """How a student prunes image tokens in recorded passes: numbers of tokens determine how many are kept."""

    def __init__(self, student: VisionLanguageStudent) -> None:
        super().__init__(student.trunk)
        self._student = student

    def tower_state(self, pixels: Tensor) -> Hashable:
        """Return the state that a recorded pass through the vision tower depends on; None if the tower has no routers.
        Raises ValueError if the pass cannot be recorded."""
        student = self._student
        if student.vision is None:
            return None
        student._follow()
        made: Hashable = student.vision._recorded_for(pixels)
        return made

    def state(self) -> Hashable:
        """Return the state of language model, dial and image router that a recorded pass depends on besides shapes.
        Raises ValueError if it cannot be recorded, as when the number of kept tokens depends on the images."""
        student, run = self._student, self._student.runtime
        language: Hashable = student._recorded_for()
        if run.bypass or student.image_router is None:
            return language
        if isinstance(run.offset, tuple) or not student.counts:
            raise ValueError("how many image tokens pass depends on the images, or differs between them")
        shares = (student.image_router.levels, student.image_router.log_gain)
        return language, run.offset, run.capacity, tuple(x._version for x in shares if x is not None)

    def room(self, image: Sequence[int], valid: Sequence[int], tokens: int) -> Room:
        """Return the Room of rows after pruning, from their numbers of image tokens and of tokens without padding."""
        student = self._student
        whole = super().room(image, valid, tokens)
        if student.runtime.bypass or student.image_router is None:
            return whole
        made = student.room(student.image_router, image, valid)
        return made if made.fewer else whole

    @contextmanager
    def told(self, prompted: Prompted) -> Iterator[None]:
        """A context in which the model is called with the embeddings that `prompted` describes."""
        student = self._student
        if student.runtime.bypass or student.image_router is None:
            with super().told(prompted):
                yield
            return
        student.foretold = prompted
        try:
            yield
        finally:
            student.foretold = None


def positions_of(kwargs: dict[str, Any], x: Tensor) -> Tensor:
    """Return the positions [..., B, T] that the language model would use for embeddings x [B, T, D]."""
    positions, cache = kwargs.get("position_ids"), cache_in(kwargs)
    if positions is None:
        start = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(start, start + x.shape[1], device=x.device).unsqueeze(0)
    return positions.expand(*positions.shape[:-2], len(x), -1)


def masks_by_place(
    kinds: Sequence[str] | None,
    windows: Sequence[int | None],
    sizes: Sequence[int],
    queries: Tensor,
    keys: Tensor,
    held: Tensor,
    dtype: torch.dtype,
) -> Any:
    """Return additive causal masks [B, 1, Q, K], by kind of layer if layers have kinds: tokens from columns queries
    [B, Q] of the input attend to those from columns keys [B, K] that are marked in held [B, K], as far back as the
    layer's window reaches.

    kinds, windows, sizes: of each layer the kind, the width of the window, and how many of the last keys it has.
    """
    back = queries[:, :, None] - keys[:, None]
    made = {}
    for kind in dict.fromkeys(kinds or [""]):
        layer = kinds.index(kind) if kinds else 0
        seen = held[:, None] & (back >= 0) & (back < (windows[layer] or torch.inf))
        hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        made[kind] = hidden.masked_fill_(~seen, torch.finfo(dtype).min)[:, None, :, -sizes[layer] :]
    return made if kinds else made[""]


def shorter_mask(mask: Any, index: Tensor, here: Tensor) -> Any:
    """Return the model's mask restricted to the tokens at index [B, L]; here [B, L]: False for padding among them.

    Models with several kinds of attention have a dictionary of masks by kind.
    """
    if isinstance(mask, dict):
        return {kind: shorter_mask(one, index, here) for kind, one in mask.items()}
    if mask is None or mask.ndim == 2:
        return here.to(torch.long)
    mask = mask.expand(len(index), -1, -1, -1)
    heads, queries, keys = mask.shape[1], index.shape[1], mask.shape[3]
    rows = repeat(index, "b q -> b h q k", h=heads, k=keys)
    columns = repeat(index, "b k -> b h q k", h=heads, q=queries)
    return selection.hide_closed_keys(mask.gather(2, rows).gather(3, columns), here, mask.dtype)


def hidden_keys(mask: Any, kept: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Any:
    """Return additive masks [B, 1, T, T] under which only the tokens marked in kept [B, T] are attended to.

    bias [B, T]: added to the attention scores of each key instead; tokens that are not kept are then attended to as
    well, unless the model's own mask hides them.
    """
    if isinstance(mask, dict):
        return {kind: hidden_keys(one, kept, bias, dtype) for kind, one in mask.items()}
    own = mask if isinstance(mask, Tensor) and mask.ndim == 4 else None
    seen = kept if bias is None else torch.ones_like(kept)
    if bias is not None and own is None and isinstance(mask, Tensor):
        seen = mask.bool()
    allowed = selection.additive(selection.hide_closed_keys(own, seen, dtype), dtype)
    return allowed if bias is None else allowed + bias.to(dtype)[:, None, None, :]
