"""Every place where Elastic leans on the inside of torch, transformers or timm: one adapter each, and a check.

`ASSUMPTIONS` is the list. What a library promises in its documentation is not on it. `tests/test_libraries.py` runs every
check; `students.selfcheck` runs them where a model does not do what it should, to say which one no longer holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""What transformers calls a key/value cache in a forward pass: the first since 5.24, the second before, the third in
GPT-NeoX's blocks."""


def cache_name(module: nn.Module) -> str:
    """The keyword under which a module's forward takes a key/value cache; ValueError where there is none we know."""
    names = inspect.signature(type(module).forward).parameters
    for name in CACHE_NAMES:
        if name in names:
            return name
    raise ValueError(
        f"{type(module).__name__}.forward has no argument for a cache (looked for {', '.join(CACHE_NAMES)})"
    )


def cache_in(kwargs: MutableMapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward pass, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def with_cache(module: nn.Module, kwargs: MutableMapping[str, Any], cache: Any) -> dict[str, Any]:
    """Keyword arguments for a module's forward that hold this cache, under the module's own name and no other."""
    others = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    return others if cache is None else {**others, cache_name(module): cache}


def cache_of(output: Any) -> Any:
    """The cache in the output of a model or of `generate`, or None."""
    return next((output[name] for name in CACHE_NAMES if name in output), None)
