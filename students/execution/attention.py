"""Attention for some tokens and some heads, by calling the model's own attention function on smaller tensors.

transformers dispatches attention by name (`ALL_ATTENTION_FUNCTIONS`). A routed attention module gets a name that is
registered here; unless its branch passes a `Plan`, the function of that name computes what the original does.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from students.architectures.lookup import architecture_of, record_in, windows_of
from students.execution import latent
from students.execution.kv_cache import DroppedLayer
from students.execution.runtime import Runtime
from students.execution.tokens import Chosen, Order, Rectangle, scatter_rows
from students.kernels import ops
from students.routers import selection

Hold: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

BLOCK = 256
"""Number of queries that share one causal mask; keys after the last of these queries are not read."""


@dataclass
class Packing:
    """Layout of the tokens of several sequences, one sequence after the other: [1, N, ...]."""

    index: Tensor
    """Position [N] of each token in its sequence, counted from the start of the cache."""
    batch: Tensor
    """Index [N] of the sequence that each token belongs to."""
    counts: list[int]
    """Number of tokens in each sequence."""
    layer: DroppedLayer | None
    """The cache layer with all keys and values so far, including those of these tokens; None without a cache."""
    window: int | None
    """Width of the sliding window: keys further back are not seen; None: no window."""
    rectangle: Rectangle | None
    """The layout in which all sequences attend in one call; None: one call for each sequence."""
    tokens: int
    """Number of tokens in each sequence before some were left out."""


@dataclass
class Plan:
    """The part of an attention layer that is computed."""

    queries: Tensor | None = None
    """Flat indices, ascending, of the tokens whose output is wanted; None: all."""
    counts: tuple[int, ...] = ()
    """Number of queries in each sequence."""
    chosen: Chosen | None = None
    """The tokens at `queries`, where the output of others may be arbitrary."""
    heads: Tensor | None = None
    """Indices of the open query heads, the same for all tokens; None: all."""
    packing: Packing | None = None
    """Layout of packed tokens; None: tokens come as [B, T, ...]."""


def route_attention(module: nn.Module, runtime: Runtime | None = None, window: int | None = None) -> None:
    """Let an attention module call `routed_attention`, which follows plans, lets query heads that share a key head
    attend together from one new token, and needs no mask for padded prompts where the call has an `order`.

    runtime: the student's; None for a model without routers. Under its `bypass`, or where it does not skip, results
    without a plan keep the original's bits, except in steps of fixed shape, whose masks change the rounding anyway.
    window: width of the layer's sliding window.
    """
    attention: Any = module
    base = attention.config._attn_implementation or "eager"
    attention.runtime, attention.window = runtime, window
    name = f"elastic_{base}"
    ALL_ATTENTION_FUNCTIONS.register(name, partial(routed_attention, base))
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = name
    if latent.has_latents(attention):
        latent.hand_on_latents(attention)


def route_trunk(trunk: nn.Module) -> None:
    """Call `route_attention` for every block of a language model without routers."""
    record, blocks = architecture_of(trunk)
    for block, window in zip(blocks, windows_of(trunk), strict=True):
        if record_in(record, block).attn_in:
            route_attention(block.get_submodule(record.attn), window=window)


def routed_attention(
    base: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    routed: Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the arguments of transformers' functions: query [B, H, T, d], key and value [B, K, C, d] ->
    ([B, T, H, d], weights); key and value may be latents and rotary keys (see latent.py).

    Tokens that the plan leaves out get zeros. If the plan has `heads`, query holds the open heads only. `slot` [1], a
    device tensor, is the index of the newest key in a step of fixed shape (recording/step.py).
    """
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)
    runtime, tokens, slot, cap = module.runtime, query.shape[2], kwargs.pop("slot", None), kwargs.get("softcap")
    plain = all(kwargs.get(name) is None for name in ("position_bias", "s_aux")) and not kwargs.get("dropout")
    rounds = runtime is None or (runtime.call.skipping and not runtime.bypass)
    free = base == "sdpa" and plain and rounds and cap is None
    hold: Hold = _as_they_are
    latents, width = latent.has_latents(module), value.shape[-1]
    if latents:
        width, packing = module.v_head_dim, None if routed is None else routed.packing
        alone = rounds and (tokens if packing is None else packing.tokens) == 1
        if plain and (alone or slot is not None):
            attend = latent.attend_to_latents
        else:
            hold, latents = partial(latent.expanded, module), False
            if packing is None or packing.layer is None:
                key, value = hold(key, value)
    order = runtime.call.order if free and runtime is not None and attention_mask is not None else None
    if order is not None and key.shape[2] == tokens and (module.window is None or module.window >= tokens):
        attend, attention_mask = partial(_in_order, attend, order), None
    if routed is None:
        reads_slots = tokens == 1 and not latents and ops.attends_to_cache(query, key, value, slot)
        if slot is not None and attention_mask is None and not reads_slots:
            seen = torch.arange(key.shape[2], device=key.device) <= slot  # a layer that has slots of its own
            attention_mask = selection.additive(seen, query.dtype)[None, None, None]
        shared = attention_mask is None or attention_mask.shape[1] == 1  # one mask for all heads
        fixed = slot is not None and base in ("sdpa", "eager")  # such steps return no attention weights
        if (free or (fixed and plain)) and shared and reads_slots:
            scale = kwargs.get("scaling") or query.shape[3] ** -0.5
            window = 0 if slot is None else module.window or 0  # else the model's mask applies it
            return ops.decode_attention(query, key, value, attention_mask, slot, scale, window, cap or 0.0), None
        few = (free and tokens == 1) or (tokens > 1 and fixed and plain and base == "sdpa" and cap is None)
        if few and key.shape[1] < query.shape[1] and shared and not latents:
            return _from_few_tokens(query, key, value, attention_mask, kwargs.get("scaling")), None
        out: tuple[Tensor, Tensor | None] = attend(module, query, key, value, attention_mask, **kwargs)
        return out
    kwargs.pop("position_ids", None)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if base == "eager":  # takes additive masks only; without one, every key is seen
            if mask is None and q.shape[2] > 1:
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
            mask = None if mask is None else selection.additive(mask, q.dtype)
        if routed.heads is None:
            out: Tensor = attend(module, q, k, v, mask, **kwargs)[0]
            return out
        if len(routed.heads) == 0:  # torch before 2.14 divides by the number of heads
            return q.new_zeros(len(q), q.shape[2], 0, width)
        of = routed.heads // getattr(module, "num_key_value_groups", 1)
        out = attend(_OneKeyPerHead(module), q, k[:, of], v[:, of], mask, **kwargs)[0]
        return out

    if routed.packing is not None:
        if routed.packing.layer is not None:
            key, value = hold(routed.packing.layer.keys, routed.packing.layer.values)
        return _packed(run, query, key, value, width, routed, routed.packing), None
    if routed.queries is None:
        return run(query, key, value, attention_mask), None
    return _selected(run, query, key, value, width, attention_mask, routed.queries, routed.counts, routed.chosen), None


def _as_they_are(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return key, value


def _from_few_tokens(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention of query [B, H, T, d] to all keys; mask [B, 1, T, C], None only if T is 1. Query heads that share a key
    head are rows of one product, which reads the keys once instead of once for each query head."""
    batch, heads, tokens, size = query.shape
    query = query.reshape(batch, key.shape[1], -1, size)
    if mask is not None and tokens > 1:
        mask = mask.repeat(1, 1, heads // key.shape[1], 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, tokens, -1).transpose(1, 2)


def _in_order(
    attend: Callable[..., tuple[Tensor, Any]],
    order: Order,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of padded rows without a mask: padding is moved behind all other tokens, which do not see it."""
    query, key, value = (order.lay(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
    return order.pick(attend(module, query, key, value, mask, **kwargs)[0]), None


class _OneKeyPerHead:
    """A view of an attention module for attention functions, with one key head for each query head."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _selected(
    run: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    mask: Tensor | None,
    queries: Tensor,
    counts: tuple[int, ...],
    chosen: Chosen | None,
) -> Tensor:
    """Run attention where every token has a key and only some are queries (see Plan); the others get zeros, or what is
    arbitrary. width: channels of a head's output."""
    batch, heads, tokens, _ = query.shape
    shape = batch, tokens, heads, width
    if len(queries) == 0:
        return query.new_zeros(shape)
    if tokens == 1:
        some = mask if mask is None or len(mask) == 1 else mask[queries]
        return scatter_rows(run(*(x.index_select(0, queries) for x in (query, key, value)), some), queries, batch)
    parts, start = [], 0
    for b, count in enumerate(counts):
        rows, start = queries[start : start + count], start + count
        for part in rows.split(BLOCK) if count else ():
            places = part - b * tokens
            if mask is None:  # transformers then means: causal, from the first key on
                visible = _causal_bias(places, query.dtype)
                last = visible.shape[-1]
                k, v = key[b : b + 1, :, :last], value[b : b + 1, :, :last]
            else:
                k, v = key[b : b + 1], value[b : b + 1]
                visible = mask[b if len(mask) > 1 else 0][None, :, places]
            parts.append(run(query[b : b + 1].index_select(2, places), k, v, visible)[0])
    out = torch.cat(parts)
    full = scatter_rows(out, queries, batch * tokens) if chosen is None else chosen.spread(out)
    return full.view(shape)


def _packed(
    run: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    plan: Plan,
    packing: Packing,
) -> Tensor:
    """Run attention of packed tokens: tokens that were left out are neither queries nor keys. key, value: those of
    these tokens, or where there is a cache of all that it holds; width: channels of a head's output."""
    if packing.rectangle is not None:
        return _in_rectangle(run, query, key, value, packing, packing.rectangle)
    layer, window = packing.layer, packing.window
    counts = list(plan.counts) if plan.queries is not None else packing.counts
    queries = torch.arange(query.shape[2], device=query.device) if plan.queries is None else plan.queries
    out = query.new_zeros(query.shape[2], query.shape[1], width)
    if layer is not None and len(packing.counts) > 1 and max(packing.counts) == 1:
        if len(queries) == 0:
            return out.unsqueeze(0)
        rows, places = packing.batch[queries], packing.index[queries]
        kept = layer.index[rows]
        here = (kept >= 0) if window is None else (kept >= 0) & (kept > (places - window)[:, None])
        q = query[0].index_select(1, queries).transpose(0, 1).unsqueeze(2)
        every = len(rows) == len(key)
        k, v = (x if every else x.index_select(0, rows) for x in (key, value))
        return out.index_copy_(0, queries, run(q, k, v, here[:, None, None])[:, 0]).unsqueeze(0)
    first = begin = 0
    for b, count in enumerate(counts):
        rows, first = queries[first : first + count], first + count
        size, start = packing.counts[b], begin
        begin += size
        if count == 0:
            continue
        if layer is None:
            k, v, kept = key[:, :, start:begin], value[:, :, start:begin], packing.index[start:begin]
        else:
            length = layer.lengths[b]
            k, v, kept = key[b : b + 1, :, :length], value[b : b + 1, :, :length], layer.index[b, :length]
        whole = count == size
        for part in rows.split(len(rows) if whole and k.shape[2] == size and window is None else BLOCK):
            visible = None
            alone = len(part) == 1 and whole and size == 1 and window is None  # one new token sees all that is kept
            if not alone and not (len(part) == count == k.shape[2] and window is None):
                visible = _causal(packing.index[part], kept, window)
            q = query[:, :, start:begin] if len(part) == size else query.index_select(2, part)
            out.index_copy_(0, part, run(q, k, v, visible)[0])
    return out.unsqueeze(0)


def _in_rectangle(
    run: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, packing: Packing, rectangle: Rectangle
) -> Tensor:
    """Run causal attention of all sequences in one call: the filling at the end of a row is seen by no token before."""
    layer, window, visible = packing.layer, packing.window, None
    k, v = map(rectangle.lay_heads, (key, value)) if layer is None else (key, value)
    if window is not None and window < packing.tokens:
        places = rectangle.lay(packing.index, fill=packing.tokens)
        visible = places[:, None, None] <= places[:, None, :, None]
        visible &= places[:, None, None] > (places - window)[:, None, :, None]
    return rectangle.pick(run(rectangle.lay_heads(query), k, v, visible)).unsqueeze(0)


def _causal(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return [1, 1, Q, K] bool: whether a key is at or before the query's position, and within its window."""
    visible = keys <= queries[:, None]
    if window is not None:
        visible &= keys > (queries - window)[:, None]
    return visible[None, None]


def _causal_bias(queries: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive causal mask [1, 1, Q, K] of queries at positions [Q], ascending, for keys 0 ... K - 1, where
    K - 1 is the last query's position.

    All queries see the keys up to the first query's position, so that only later keys are compared.
    """
    first, last = int(queries[0]), int(queries[-1])
    bias = queries.new_zeros(len(queries), last + 1, dtype=dtype)
    later = torch.arange(first + 1, last + 1, device=queries.device)
    bias[:, first + 1 :].masked_fill_(later > queries[:, None], torch.finfo(dtype).min)
    return bias[None, None]
