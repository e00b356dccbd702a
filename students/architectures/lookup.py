"""The record of a model, and what it says of its blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from students.architectures.image import IMAGE_MODELS, side_by_side
from students.architectures.language import LANGUAGE_MODELS, LLAMA
from students.architectures.record import LINEAR_SITES, Architecture

Linear: TypeAlias = nn.Linear | Conv1D

ARCHITECTURES: dict[str, Architecture] = {**LANGUAGE_MODELS, **IMAGE_MODELS}
"""Keyed by the config's `model_type`, or for models of timm by the name of their class."""


def architecture_of(model: nn.Module) -> tuple[Architecture, list[nn.Module]]:
    """The record that fits a model, and its blocks.

    Raises ValueError where no record fits, or a module that the record names is missing.
    """
    kind = kind_of(model)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{type(model).__name__} (model_type {kind!r}) is not supported: looked for a record of module names in "
            f"students/architectures, which has {', '.join(ARCHITECTURES)}; students/README.md says how to add one"
        )
    record = ARCHITECTURES[kind]
    if record.prefix is None:
        registers = getattr(getattr(model, "config", None), "num_register_tokens", None)
        prefix: Any = model.num_prefix_tokens if registers is None else 1 + registers
        record = replace(record, prefix=prefix)
    container: Any = _get(trunk_of(model), record.blocks, type(model).__name__)
    blocks = list(container)
    if kind == "Eva":  # whose layers differ from model to model
        if getattr(blocks[0].attn, "qkv", None) is None:
            record = replace(record, attn_in=LLAMA.attn_in)
        if hasattr(blocks[0].mlp, "fc1_g"):
            record = replace(record, mlp_in=("fc1_g", "fc1_x"))
    if hasattr(blocks[0], "attns"):
        record = side_by_side(record, len(blocks[0].attns))
    names = [record.attn, record.mlp, record.attn_exit, record.mlp_exit]
    names += [record.norm] if record.causal and record.prenorm else []
    names += [name for site in LINEAR_SITES for name in record.linears(site)]
    for name in filter(None, names):
        _get(blocks[0], name, type(model).__name__)
    return record, blocks


def kind_of(model: nn.Module) -> str:
    """What `ARCHITECTURES` calls this model."""
    return model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__


def trunk_of(model: nn.Module) -> nn.Module:
    """The module that holds the blocks: the model without its head, or itself."""
    return model.base_model if isinstance(model, PreTrainedModel) else model


@dataclass(frozen=True)
class Sizes:
    """Sizes of a block's attention."""

    width: int
    """Of the residual stream."""
    heads: int
    size: int
    """Channels of a head."""
    groups: int
    """Heads of keys and values."""
    window: int | None
    """Keys that a sliding-window layer sees at most."""


def sizes_of(model: nn.Module, record: Architecture, number: int, block: nn.Module) -> Sizes:
    """Sizes of block `number`."""
    if not isinstance(model, PreTrainedModel):
        out = record.linears("attn_out")
        attn: Any = block.get_submodule(out[0].rpartition(".")[0])
        width = shape_of(block.get_submodule(out[0]))[0]
        heads = attn.num_heads * len(out)
        return Sizes(width, heads, attn.head_dim, heads, None)
    config = model.config
    heads = config.num_attention_heads
    window = None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[number] == "sliding_attention":
        window = config.sliding_window
    elif kinds is None:
        window = getattr(config, "sliding_window", None)
    return Sizes(
        config.hidden_size,
        heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        getattr(config, "num_key_value_heads", None) or heads,
        window,
    )


def _get(root: nn.Module, path: str, owner: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"{owner} is not supported: looked for {path!r} in {type(root).__name__}, "
            f"which has {', '.join(name for name, _ in root.named_children())}"
        ) from None


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in], whichever way the layer stores it, wrapped or not."""
    base: Any = getattr(linear, "base_layer", linear)
    weight: Tensor = base.weight
    return weight.T if isinstance(base, Conv1D) else weight


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer, also where its weight is packed."""
    base: Any = getattr(linear, "base_layer", linear)
    if isinstance(base, Conv1D):
        inputs, outputs = base.weight.shape
        return outputs, inputs
    return base.out_features, base.in_features


def can_be_read_in_part(linear: nn.Module) -> bool:
    """Whether single rows and columns of a linear layer's weight can be read: not where it is quantized, in a way that
    only its own library knows."""
    base: Any = getattr(linear, "base_layer", linear)
    return type(base.weight) in (Tensor, nn.Parameter) and base.weight.is_floating_point()


@torch.no_grad()
def values_of(linear: nn.Module) -> Tensor:
    """The weight of a linear layer [out, in] in float32, also where it is packed: then it is the layer's answer to each
    input on its own."""
    if can_be_read_in_part(linear):
        return weight_of(linear).float()
    base: Any = getattr(linear, "base_layer", linear)
    like = base.weight if base.weight.is_floating_point() else torch.empty(0, device=base.weight.device)
    out: Tensor = base(torch.eye(base.in_features, dtype=like.dtype, device=like.device)).float()
    return (out if base.bias is None else out - base.bias.float()).T
