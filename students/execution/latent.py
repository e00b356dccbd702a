"""Multi-head latent attention (arXiv 2405.04434, section 2.1), whose cache holds one latent vector and one rotary key
for each token, the same for all heads.

transformers makes keys and values of all heads from all of the cache whenever a token is decoded: products that grow
with the length of the text. For one token the same numbers come from two products that do not: each head's query is
taken to the space of latents, where it meets them as they are, and what it finds there is taken back.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from students.architectures.lookup import can_be_read_in_part, values_of, weight_of
from students.routers import selection

EXPANSION = "kv_b_proj"
"""The linear layer [heads * (plain + value), rank] that makes keys and values from latents."""


def has_latents(module: Any) -> bool:
    """Return whether an attention module caches latents."""
    return hasattr(type(module), "expand_kv")


def hand_on_latents(module: nn.Module) -> None:
    """Let an attention module give its attention function latents [B, 1, C, rank] and rotary keys [B, 1, C, rotary], as
    they are cached, in place of keys and values."""
    attention: Any = module
    attention.expand_kv = partial(_as_cached, module)


def _as_cached(module: Any, latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    if not module.config._attn_implementation.startswith("elastic_"):
        return expanded(module, latents, rotary)  # someone has chosen another attention function since
    return latents, rotary


def expanded(module: Any, latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Return (keys [B, H, C, plain + rotary], values [B, H, C, value]), as the model itself makes them."""
    keys, values = type(module).expand_kv(module, latents, rotary)
    return keys, values


def attend_to_latents(
    module: Any,
    query: Tensor,
    latents: Tensor,
    rotary: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of query [B, H, T, plain + rotary] to latents [B, 1, C, rank] and rotary keys [B, 1, C, rotary]; mask
    [1 or B, 1, T, C], None only if T is 1. Returns (output [B, T, H, value], weights [B, H, T, C])."""
    batch, heads, tokens, _ = query.shape
    plain, value = module.qk_nope_head_dim, module.v_head_dim
    weight = _weight(module, query.dtype).view(heads, plain + value, -1)
    own, turned = query[..., :plain], query[..., plain:]
    own = torch.bmm(own.transpose(0, 1).flatten(1, 2), weight[:, :plain])  # [H, B * T, rank]
    own = own.view(heads, batch, tokens, -1).transpose(0, 1).flatten(1, 2)
    kept = latents.squeeze(1)
    scores = torch.bmm(own, kept.mT) + torch.bmm(turned.flatten(1, 2), rotary.squeeze(1).mT)
    scores = scores.view(batch, heads, tokens, -1) * (module.scaling if scaling is None else scaling)
    if mask is not None:
        scores = scores + selection.additive(mask, scores.dtype)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = scores.softmax(-1, dtype=wide).to(query.dtype)
    found = torch.bmm(weights.flatten(1, 2), kept).view(batch, heads, tokens, -1)
    # the weight comes first, as it lies: on CPUs a part of it, transposed, is copied, which takes ten times as long
    out = torch.bmm(weight[:, plain:], found.transpose(0, 1).flatten(1, 2).mT)  # [H, value, B * T]
    return out.view(heads, value, batch, tokens).permute(2, 3, 0, 1), weights


def _weight(module: Any, dtype: torch.dtype) -> Tensor:
    """Return the weight that makes keys and values from latents; of a quantized layer it is recovered once."""
    linear = getattr(module, EXPANSION)
    if can_be_read_in_part(linear):
        return weight_of(linear)
    if not hasattr(module, "recovered"):
        module.recovered = values_of(linear).to(dtype)
    recovered: Tensor = module.recovered
    return recovered
