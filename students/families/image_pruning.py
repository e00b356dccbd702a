"""Pruning of image tokens in front of a language model: the router's module, masks and positions of pruned prompts."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from einops import repeat
from torch import Tensor, nn

from students.architectures import windows_of
from students.execution.runtime import Runtime
from students.execution.wrapper import Named
from students.libraries import cache_in
from students.recording.prompt import Prompted, PromptPruning, Room, in_rows
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


class Windows:
    """The sliding windows of a language model of whose prompts image tokens are pruned: they reach back over so many
    columns of the input, whether or not the tokens are there."""

    def __init__(self, trunk: nn.Module) -> None:
        self._kinds: Sequence[str] | None = getattr(trunk.config, "layer_types", None)
        self._widths = windows_of(trunk)
        self.any = any(self._widths)
        """Whether a layer has a window."""

    def masks(self, queries: Tensor, keys: Tensor, held: Tensor, dtype: torch.dtype, sizes: Sequence[int]) -> Any:
        """Return additive causal masks [B, 1, Q, K], by kind of layer if layers have kinds: tokens from columns queries
        [B, Q] of the input attend to those from columns keys [B, K] that are marked in held [B, K].

        sizes: how many of the last keys each layer has.
        """
        back, made = queries[:, :, None] - keys[:, None], {}
        for kind in dict.fromkeys(self._kinds or [""]):
            layer = self._kinds.index(kind) if self._kinds else 0
            seen = held[:, None] & (back >= 0) & (back < (self._widths[layer] or torch.inf))
            made[kind] = selection.additive(seen[:, None, :, -sizes[layer] :], dtype)
        return made if self._kinds else made[""]

    def own_masks(self, kwargs: dict[str, Any], valid: Tensor) -> Any:
        """Return the mask in a language model's kwargs or, where it would make masks of its own and count kept tokens
        for its windows, masks that count columns; valid [B, T]: tokens that are not padding."""
        mask, tokens = kwargs.get("attention_mask"), valid.shape[1]
        if isinstance(mask, dict):
            whole = all(part is not None for part in mask.values())
        else:
            whole = (mask is not None and mask.ndim == 4) or not any(w and w < tokens for w in self._widths)
        if whole:
            return mask
        places = torch.arange(tokens, device=valid.device).expand(len(valid), -1)
        return self.masks(places, places, valid, kwargs["inputs_embeds"].dtype, [tokens] * len(self._widths))


def is_flat(mask: Any) -> TypeGuard[Tensor]:
    """Return whether a mask is [B, T], as the model's caller gives it."""
    return isinstance(mask, Tensor) and mask.ndim == 2


def pick_features(kwargs: dict[str, Any], index: Tensor) -> None:
    """Restrict a language model's embeddings in kwargs, and DeepStack's features, to the tokens at index [B, L]."""
    if (shown := kwargs.get("visual_pos_masks")) is not None and shown.ndim == 2:
        kwargs |= in_rows(shown, kwargs["deepstack_visual_embeds"])
    wide = index.unsqueeze(-1).expand(-1, -1, kwargs["inputs_embeds"].shape[-1])
    kwargs["inputs_embeds"] = kwargs["inputs_embeds"].gather(1, wide)
    if shown is not None:
        kwargs["deepstack_visual_embeds"] = [part.gather(1, wide) for part in kwargs["deepstack_visual_embeds"]]


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


def shares_of(router: ImageRouter, run: Runtime, rows: int) -> list[float]:
    """Return the share of each row's image tokens that passes, where that does not depend on the images."""
    if router.spec.selection == "topk":
        return [run.capacity if run.training else run.kept] * rows
    offsets = run.offset if isinstance(run.offset, tuple) else (run.offset,)
    return [router.quota(offset) for offset in offsets for _ in range(rows // len(offsets))]


def choose(router: ImageRouter, run: Runtime, score: Tensor, image: Tensor, shares: Sequence[float] | None) -> Tensor:
    """Return gates [B, T] of the image tokens at image [B, T] bool; gates of other tokens are arbitrary.

    shares: the share of each row's image tokens that passes; None: as many as have a score of at least 0, by a quota in
    training a share over all image tokens of the batch.
    """
    shift = router.shift(run.dial_of(score))
    if router.spec.selection == "threshold":
        return selection.threshold(score + shift)
    have = image.sum(1, keepdim=True)
    best, order = score.masked_fill(~image, -torch.inf).sort(dim=1, descending=True, stable=True)
    limit: Tensor | None = None
    if shares is None:  # as in selection.even
        limit = torch.as_tensor(-shift, dtype=score.dtype, device=score.device)
        ranked = run.pool(score.detach().masked_fill(~image, -torch.inf).flatten()).sort().values
        count = (ranked > -torch.inf).sum().clamp(min=1)
        share = ((len(ranked) - torch.searchsorted(ranked, limit.detach())) / count).clamp(max=1)
        most = (share * have).round().clamp(min=1)
    else:
        alike = len(set(shares)) == 1
        each = shares[0] if alike else torch.tensor(shares, dtype=torch.double, device=score.device).unsqueeze(1)
        most = (each * have.double()).round().clamp(min=1)
    if limit is None:  # scores count relative to the last that passes: a common shift must not saturate gradients
        limit = best.detach().gather(1, (most - 1).long())
    soft = (score - limit).sigmoid()
    return (order.argsort(dim=1) < most).to(score.dtype) + (soft - soft.detach())
