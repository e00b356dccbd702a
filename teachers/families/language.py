"""Causal language models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def require_rows(model: Any, tokenizer: Any, ids: Tensor) -> None:
    """ValueError where one of the token ids, of any shape, has no row in the model's embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    worst = int(ids.max()) if ids.numel() else 0
    if worst >= rows:
        raise ValueError(
            f"the tokenizer has more tokens than the model: {tokenizer.convert_ids_to_tokens(worst)!r} is number "
            f"{worst}, and the model's embedding has {rows} rows; take the tokenizer that the model was trained with, "
            "or save the model after resize_token_embeddings"
        )


def most_tokens(trunk: nn.Module) -> int | None:
    """How many tokens a model can read, where every position has learned numbers of its own; None: any number."""
    most, words = getattr(trunk.config, "max_position_embeddings", None), trunk.get_input_embeddings()
    tables = (m for m in trunk.modules() if isinstance(m, nn.Embedding) and m is not words)
    return most if any(table.num_embeddings == most for table in tables) else None
