"""Checks of what a student of a language model is called with, before anything runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from students.kernels import devices
from students.libraries import cache_in


def require_inputs(model: PreTrainedModel, ids: Any, given: dict[str, Any]) -> None:
    """Raise ValueError unless ids are token ids [B, T] that the model knows, and what goes with them in `given` has
    their shape; nothing is looked at where the call has something else than ids (None)."""
    if ids is None:
        return
    _require_ids(model, ids)
    cache = cache_in(given)
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(f"the cache is a {type(cache).__name__}: give one of transformers, such as DynamicCache()")
    for name in ("attention_mask", "prompt", "position_ids"):
        value = given.get(name)
        if not isinstance(value, Tensor) or value.ndim == 4:  # masks of each query, and other ways to say them
            continue
        rows, count = value.shape[-2:] if value.ndim > 1 else (0, 0)
        fits = rows == len(ids) or (name == "position_ids" and rows == 1)
        fits &= count == ids.shape[1] or (name == "attention_mask" and cache is not None and count > ids.shape[1])
        if not fits or (value.ndim == 3 and name != "position_ids"):  # of M-RoPE they have an axis in front
            raise ValueError(f"{name} is {list(value.shape)}: it goes with input_ids {list(ids.shape)}")


def _require_ids(model: PreTrainedModel, ids: Any) -> None:
    """Raise ValueError unless ids are token ids [B, T] that the model knows. On a GPU their size is not looked at,
    because the host would wait for it."""
    if not (isinstance(ids, Tensor) and ids.ndim == 2 and ids.numel() and ids.dtype in (torch.long, torch.int)):
        given = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"input_ids is {given}: give token ids, torch.long [batch, tokens], such as those of "
            "tokenizer(text, return_tensors='pt').input_ids"
        )
    if not (devices.runs_ahead(ids.device) or torch.compiler.is_compiling()):
        words: Any = model.get_input_embeddings()
        last = words.num_embeddings - 1
        least, most = map(int, ids.aminmax())
        if least < 0 or most > max(last, getattr(model.config, "image_token_id", None) or 0):
            worst = least if least < 0 else most
            raise ValueError(f"input_ids holds {worst}: the model's tokens are numbered from 0 to {last}")
