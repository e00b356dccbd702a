"""Adapters to what changes from release to release of transformers and timm, and to what a recording must not meet.

What else is assumed of internals of torch, transformers and timm is checked by tests/students/test_libraries.py. Module
names that differ between architectures are in the records of students/architectures; they are looked up when a student
is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

CACHE_NAMES = ("cache", "past_key_values", "layer_past", "cache_params")
"""Keywords by which forward passes of transformers take a key/value cache: the first since version 5.24, the second
before, the third in the blocks of GPT-NeoX, the fourth before 5.24 in what hybrid models have in place of attention."""


def cache_name(module: nn.Module) -> str:
    """Return the keyword by which a module's forward takes a key/value cache; ValueError if there is none."""
    names = inspect.signature(type(module).forward).parameters
    for name in CACHE_NAMES:
        if name in names:
            return name
    raise ValueError(f"{type(module).__name__}.forward takes no cache (looked for {', '.join(CACHE_NAMES)})")


def cache_in(kwargs: MutableMapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of a forward pass, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def with_cache(module: nn.Module, kwargs: MutableMapping[str, Any], cache: Any) -> dict[str, Any]:
    """Return the keyword arguments with this cache, by the keyword of the module's forward, and no other cache."""
    others = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    return others if cache is None else {**others, cache_name(module): cache}


def cache_of(output: Any) -> Any:
    """Return the cache in the output of a model or of `generate`, or None."""
    return next((output[name] for name in CACHE_NAMES if name in output), None)


@contextmanager
def fresh_positions(model: nn.Module) -> Iterator[None]:
    """Context in which a model has no state of earlier prompts: Qwen2-VL models keep the last prompt's position shift
    (`rope_deltas`)."""
    base = getattr(model, "base_model", model)
    if not hasattr(base, "rope_deltas"):
        yield
        return
    before, base.rope_deltas = base.rope_deltas, None
    try:
        yield
    finally:
        base.rope_deltas = before


@contextmanager
def kept_rotary(model: nn.Module) -> Iterator[None]:
    """Context in which a model of timm makes the rotary embeddings of an image size once and keeps them, for as long as
    the model is there: DINOv3 copies coordinates from the host in every forward pass, which no CUDA graph can hold.

    Embeddings with parameters, and those of a model in training, which timm may shift at random, are made as ever.
    """
    rope: Any = getattr(model, "rope", None)
    varies = not hasattr(rope, "get_embed") or rope.training or any(True for _ in rope.parameters())
    if varies or torch.compiler.is_compiling():
        yield
        return
    make: Callable[..., Tensor] = rope.get_embed
    kept: dict[Any, Tensor] = rope.__dict__.setdefault("kept_by_elastic", {})

    def get_embed(shape: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if shape is None or args or kwargs:
            return make(shape, *args, **kwargs)
        key = tuple(shape), *((x.device, x.dtype) for x in rope.buffers())
        if key not in kept:
            with torch.inference_mode(False), torch.no_grad():
                kept[key] = make(shape)
        return kept[key]

    rope.get_embed = get_embed
    try:
        yield
    finally:
        del rope.get_embed


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Context in which transformers takes every row of a batch for one sequence, if the caller passes no positions.
    Else it looks for packed sequences in the positions that it has just made, and the host waits for the device."""
    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name)
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)
