"""Load causal language models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teachers import hub
from teachers.families import Loaded
from teachers.families.image import SUPPORTED
from teachers.quantize import unpacking
from teachers.quiet import one_line
from teachers.registry import LANGUAGE_MODEL_OF


def load(name: str, folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Loaded:
    """Load the causal language model in `folder` and its tokenizer; of a vision-language model (Qwen3.5, Gemma 4) its
    language model. Raises a one-line ValueError if that fails."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with one_line(f"{name}: config.json cannot be read"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not remote:
        known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        saved_as = config.architectures or ["an unnamed architecture"]
        if isinstance(getattr(config, "image_size", None) or getattr(config, "num_channels", None), (int, list, tuple)):
            raise ValueError(f"{name}: {config.model_type} is an image model that is not supported; {SUPPORTED}")
        within = known is not None and type(config).sub_configs.get("text_config") is known.config_class
        if known is None or (config.architectures and known.__name__ not in config.architectures and not within):
            raise ValueError(f"{name} is no causal language model: {config.model_type}, saved as {', '.join(saved_as)}")
    hub.require_weights(name, folder, config)
    options, start = unpacking(folder), LANGUAGE_MODEL_OF.get(config.model_type)
    if start is not None:
        options |= {"config": config.get_text_config(), "key_mapping": {f"^{re.escape(start)}": "model."}}
    model, unused = hub.read_model(name, folder, AutoModelForCausalLM, dtype, trust_remote_code, **options)
    if start is not None:  # weights of towers are dropped on purpose: not reported
        parts = {f"model.{part}" for part, _ in model.base_model.named_children()}
        unused = [key for key in unused if ".".join(key.split(".")[:2]) in parts]
    patterns = "*token*", "*vocab*", "*.model"
    tokenizer = hub.read_beside(name, folder, "tokenizer", AutoTokenizer, trust_remote_code, *patterns)
    with one_line(f"{name}: tokenizer cannot be used"):
        tokenizer("")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Loaded(model, tokenizer, unused)


def random_model(settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """Return a transformers model with random weights; settings: of its configuration, `model_type` included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**settings)
    config = config.get_text_config() if config.model_type in LANGUAGE_MODEL_OF else config
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def require_rows(model: Any, tokenizer: Any, ids: Tensor) -> None:
    """Raise ValueError if one of the token ids, a tensor of any shape, has no row in the model's embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    worst = int(ids.max()) if ids.numel() else 0
    if worst >= rows:
        raise ValueError(
            f"the tokenizer has more tokens than the model: {tokenizer.convert_ids_to_tokens(worst)!r} is number "
            f"{worst}, and the model's embedding has {rows} rows; take the tokenizer that the model was trained with, "
            "or save the model after resize_token_embeddings"
        )


def most_positions(trunk: Any) -> int | None:
    """Return how many tokens a model's config has positions for, stretched by the factor that it gives; None if it says
    nothing. Models without a learned embedding of each position compute beyond that, but never learned to."""
    most: int | None = getattr(trunk.config, "max_position_embeddings", None)
    rope: dict[str, Any] = getattr(trunk.config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # of all layers, or of each type
    return most and round(most * max(kind.get("factor") or 1 for kind in kinds))


def most_tokens(trunk: Any) -> int | None:
    """Return how many tokens a model with a learned embedding of each position can read; None for other models, which
    read any number."""
    most, words = getattr(trunk.config, "max_position_embeddings", None), trunk.get_input_embeddings()
    tables = (m for m in trunk.modules() if isinstance(m, nn.Embedding) and m is not words)
    return most if any(table.num_embeddings == most for table in tables) else None
