"""Pruning of image tokens in front of a language model.

The choice is made once, from the prompt: from image tokens as the projector outputs them and, with `query`, from the
question. Pruned tokens have no place in the sequence behind the pruning point: they are neither computed nor cached
there, and the remaining tokens keep their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn
from transformers import DynamicCache

from students.architectures.lookup import states_by_kind, windows_of
from students.execution.kv_cache import memory_of
from students.execution.runtime import Runtime
from students.execution.wrapper import Named
from students.kernels.attention_gradient import learning
from students.kernels.capture import Fetched
from students.libraries import cache_in
from students.recording.prompt import Prompted, PromptSize, in_rows
from students.routers import ImageRouter, selection

LEAK = 1e-8
"""Weight of a closed image token in attention while routers are trained: so small that even a token to which all others
attend has no effect."""


class PruningPoint(nn.Module):
    """Holds the router of image tokens inside the language model, called `door` in the names of saved parameters."""

    def __init__(self, router: ImageRouter) -> None:
        super().__init__()
        self.routers = Named[ImageRouter]({"image": router})


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


class ImagePruner:
    """Decides which image tokens of a prompt enter a language model, and restricts the model's inputs to them."""

    def __init__(self, trunk: nn.Module, runtime: Runtime, alone: bool) -> None:
        """trunk: the language model. alone: whether its student has no other routers in blocks."""
        self.trunk: Any = trunk
        self.runtime = runtime
        self._alone = alone
        self._windows = Windows(trunk)
        self._states = states_by_kind(trunk)
        """By type of layer, whether blocks keep a state in place of keys and values; empty: none does."""

    @property
    def router(self) -> ImageRouter | None:
        """The router of image tokens, or None."""
        place: PruningPoint | None = getattr(self.trunk, "door", None)
        return None if place is None else place.routers["image"]

    @property
    def by_count(self) -> bool:
        """Whether only image tokens are routed, and by quota: a prompt's cost follows from its numbers of tokens."""
        return self._alone and self.router is not None and self.router.spec.selection == "quota"

    @property
    def counts(self) -> bool:
        """Whether the numbers of image tokens alone determine how many pass."""
        if self.router is None or self.router.spec.selection == "threshold":
            return False
        return self.router.spec.selection == "topk" or not self.runtime.training or self.by_count

    def size_of(self, router: ImageRouter, image: Sequence[int], valid: Sequence[int]) -> PromptSize:
        """Return the size of prompts from each row's numbers of image tokens and of all tokens, if `counts`."""
        passing = [
            min(have, max(1, round(share * have)))  # as in `choose`
            for have, share in zip(image, self._shares(router, len(image)), strict=True)
        ]
        return PromptSize.of([t - have + some for t, have, some in zip(valid, image, passing, strict=True)], valid)

    def _shares(self, router: ImageRouter, rows: int) -> list[float]:
        """Return the share of each row's image tokens that passes, if `counts`."""
        run = self.runtime
        if router.spec.selection == "topk":
            return [run.capacity if run.training else run.kept] * rows
        offsets = run.offset if isinstance(run.offset, tuple) else (run.offset,)
        return [router.quota(offset) for offset in offsets for _ in range(rows // len(offsets))]

    def choose(self, router: ImageRouter, score: Tensor, image: Tensor) -> Tensor:
        """Return gates [B, T] of the image tokens at image [B, T] bool; gates of other tokens are arbitrary.

        Where numbers do not determine how many pass, those with a score of at least 0 do, or by a quota in training a
        share over all image tokens of the batch.
        """
        run, shift = self.runtime, router.shift(self.runtime.dial_of(score))
        if router.spec.selection == "threshold":
            return selection.threshold(score + shift)
        have = image.sum(1, keepdim=True)
        best, order = score.masked_fill(~image, -torch.inf).sort(dim=1, descending=True, stable=True)
        if self.counts:
            shares = self._shares(router, len(score))
            alike = len(set(shares)) == 1
            each = shares[0] if alike else torch.tensor(shares, dtype=torch.double, device=score.device).unsqueeze(1)
            most = (each * have.double()).round().clamp(min=1)
            # scores count relative to the last that passes: a common shift must not saturate gradients
            limit = best.detach().gather(1, (most - 1).long())
        else:  # as in selection.even
            limit = torch.as_tensor(-shift, dtype=score.dtype, device=score.device)
            ranked = run.pool(score.detach().masked_fill(~image, -torch.inf).flatten()).sort().values
            count = (ranked > -torch.inf).sum().clamp(min=1)
            share = ((len(ranked) - torch.searchsorted(ranked, limit.detach())) / count).clamp(max=1)
            most = (share * have).round().clamp(min=1)
        soft = (score - limit).sigmoid()
        return (order.argsort(dim=1) < most).to(score.dtype) + (soft - soft.detach())

    def prune(
        self, router: ImageRouter, prompted: Prompted, prompt: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, int]:
        """Remove closed image tokens from the language model's kwargs (skip), or hide them from other tokens (mask).

        prompt [B, T] bool: the tokens that sequence-level decisions may read; None: all. Returns a bool mask [B, L] of
        the tokens now in kwargs that are not padding, and the number that are; (None, 0) if nothing was changed.
        """
        run, x, valid = self.runtime, kwargs["inputs_embeds"], prompted.valid
        gate = self._decide(router, prompted, prompt, x)
        if torch.is_grad_enabled():
            if run.decisions is not None and run.probed is None:
                run.decisions.valid = gate
            bias = torch.log(gate * (1 - LEAK) + LEAK)
            kwargs["inputs_embeds"] = learning(x, bias)
            kwargs["attention_mask"] = self._masks(kwargs, valid, valid, gate, bias)
            return valid, int(valid.numel() - valid.sum())
        kept = (gate != 0) & valid
        size = self._size_of(router, prompted, kept)
        if size.fewer:
            return self._shorten(prompted, kept, size, kwargs)
        if prompted.size is None or size.kept == valid.numel():
            return None, 0
        # a recorded pass, whose caller leaves padding to us
        kwargs["attention_mask"] = hidden_keys(kwargs.get("attention_mask"), valid, None, x.dtype)
        return valid, valid.numel() - size.kept

    def _decide(self, router: ImageRouter, prompted: Prompted, prompt: Tensor | None, x: Tensor) -> Tensor:
        """Return the gates [B, T] of all tokens of x [B, T, D]: 1 for text, 0 for padding."""
        run, valid = self.runtime, prompted.valid
        assert prompted.image is not None, "an image came with this call"
        image = prompted.image & valid
        question = valid & ~image if prompt is None else valid & ~image & prompt
        if prompted.asked is not None:
            question = question & prompted.asked
        score = router.of_prompt(x, question)
        if run.probed is not None:
            gate = torch.ones(image.shape, dtype=x.dtype, device=x.device, requires_grad=True)
            run.probed["image"] = gate, F.rms_norm(x.detach(), x.shape[-1:])
            return gate
        gate = torch.where(image, self.choose(router, score, image), valid.to(score.dtype))
        run.note("image", router.spec, gate, score.unsqueeze(-1))
        return gate

    def _size_of(self, router: ImageRouter, prompted: Prompted, kept: Tensor) -> PromptSize:
        """Return the size of prompts whose tokens at kept [B, T] pass; wait for the device if numbers are not known."""
        if prompted.size is not None:
            return prompted.size
        if prompted.counts is not None:
            return self.size_of(router, *prompted.counts.wait().tolist())
        return PromptSize.of(*Fetched(torch.stack([kept.sum(1), prompted.valid.sum(1)])).wait().tolist())

    def _shorten(
        self, prompted: Prompted, kept: Tensor, size: PromptSize, kwargs: dict[str, Any]
    ) -> tuple[Tensor, int]:
        """As `prune`, for prompts of which some tokens are not in kept [B, T]."""
        run, x, cache, valid = self.runtime, kwargs["inputs_embeds"], cache_in(kwargs), prompted.valid
        positions = positions_of(kwargs, x)
        memory = None if cache is None else memory_of(cache)
        place = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if self._windows.any else None
        if memory is not None:
            if not isinstance(cache, DynamicCache):
                raise ValueError(f"a {type(cache).__name__} has a fixed length: image routers need a dynamic cache")
            memory.next = positions.masked_fill(~valid, 0).amax(-1, keepdim=True) + 1
        if run.execution == "mask":
            if run.decisions is not None:
                run.decisions.valid = kept
            if memory is not None:
                memory.append(kept, place)
            kwargs["attention_mask"] = self._masks(kwargs, valid, kept, kept.to(x.dtype))
            return kept, kept.numel() - size.kept
        # kept tokens move to the right end, so that every row's last token is in the last column
        index = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, -size.tokens :]
        here = kept.gather(1, index)
        if run.decisions is not None:
            run.decisions.index, run.decisions.valid = index, here
        if memory is not None:
            memory.append(here, None if place is None else index)
        kwargs["position_ids"] = positions.gather(-1, index.expand(*positions.shape[:-1], -1))
        pick_features(kwargs, index)
        mask, padded = shorter_mask(self._windows.own_masks(kwargs, valid), index, here), here.numel() - size.kept
        # without cache and mask, transformers would take gaps in positions for borders between packed texts
        if isinstance(mask, Tensor) and mask.ndim == 2 and cache is not None:
            if not padded:
                mask = None
            elif prompted.size is not None:
                mask = selection.additive(selection.hide_closed_keys(None, here, x.dtype), x.dtype)
        kwargs["attention_mask"] = mask
        return here, padded

    def _masks(
        self, kwargs: dict[str, Any], valid: Tensor, kept: Tensor, gate: Tensor, bias: Tensor | None = None
    ) -> Any:
        """Return the masks under which only tokens in kept [B, T] are attended to (see `hidden_keys`), and by which the
        state of blocks without attention sees those only whose gate [B, T] is not 0 (see GatedMixer)."""
        own, dtype = self._windows.own_masks(kwargs, valid), kwargs["inputs_embeds"].dtype
        made = hidden_keys(own, kept, bias, dtype)
        if not self._states:
            return made
        return {kind: gate if state else made for kind, state in self._states.items()}

    def extend(self, prompted: Prompted, kwargs: dict[str, Any]) -> None:
        """Set positions and cache places of tokens that follow a shortened prompt."""
        cache = cache_in(kwargs)
        memory = None if cache is None else memory_of(cache)
        if memory is None or memory.held is None or memory.next is None:
            return
        count = prompted.valid.shape[1]
        new = torch.arange(count, device=memory.next.device)
        kwargs["position_ids"] = memory.next + new
        memory.append(prompted.valid, new.expand(len(prompted.valid), -1) if self._windows.any else None)
        memory.next = memory.next + count
        if memory.places is not None:
            sizes = [layer.get_mask_sizes(count)[0] for layer in cache.layers]
            columns = memory.places[:, -count:], memory.places
            kwargs["attention_mask"] = self._windows.masks(*columns, memory.held, kwargs["inputs_embeds"].dtype, sizes)
