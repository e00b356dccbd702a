"""Look up the record of a model, its blocks, and the sizes and weights of its linear layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from students.architectures.image import IMAGE_MODELS, side_by_side
from students.architectures.language import LANGUAGE_MODELS, LLAMA
from students.architectures.record import Architecture
from students.sites import LINEAR_SITES

Linear: TypeAlias = nn.Linear | Conv1D

ARCHITECTURES: dict[str, Architecture] = {**LANGUAGE_MODELS, **IMAGE_MODELS}
"""All records by the config's `model_type`, or for models of timm by class name."""


def architecture_of(model: nn.Module) -> tuple[Architecture, list[nn.Module]]:
    """Return the record of a model, adapted to its configuration, and the model's blocks.

    ValueError if there is no record for the model, a module that the record names is missing, or a block has weight
    matrices outside of the modules that are named.
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
    if not blocks:
        raise ValueError(f"{type(model).__name__} ({kind}) has no blocks: there is nothing to route")
    if kind == "Eva":  # a class of models whose blocks have different linear layers
        if getattr(blocks[0].attn, "qkv", None) is None:
            record = replace(record, attn_in=LLAMA.attn_in)
        if hasattr(blocks[0].mlp, "fc1_g"):
            record = replace(record, mlp_in=("fc1_g", "fc1_x"))
    if kind == "dinov3_vit" and hasattr(blocks[0].mlp, "gate_proj"):
        record = replace(record, mlp_in=LLAMA.mlp_in)
    if record.expand and getattr(model.config, "q_lora_rank", None) is None:
        record = replace(record, attn_in=("q_proj", *record.attn_in[1:]), expand=record.expand[1:])
    if hasattr(blocks[0], "attns"):
        record = side_by_side(record, len(blocks[0].attns))
    if record.beside is not None and not _has(blocks[0], record.beside[1]):
        record = replace(record, beside=None, hybrid=record.hybrid and replace(record.hybrid, beside=None))
    config = getattr(model, "config", None)
    if found := [f"{key} is {value}" for key in record.without if (value := getattr(config, key, None))]:
        raise ValueError(f"{type(model).__name__} ({kind}) is supported only without some parts: {', '.join(found)}")
    for number, block in enumerate(blocks):
        own = record_in(record, block)
        _check_parts(kind, number, block, own)
        if number and not record.hybrid:
            continue
        names = [own.attn, own.mlp, own.attn_exit, own.mlp_exit]
        names += [own.norm] if own.causal and own.prenorm else []
        names += [name for site in (*LINEAR_SITES, "expand") for name in own.linears(site)]
        for name in filter(None, names):
            _get(block, name, type(model).__name__)
    return record, blocks


def _check_parts(kind: str, number: int, block: nn.Module, own: Architecture) -> None:
    """Raise ValueError if a block has weight matrices outside of the parts that its record names: nothing would route
    them, and no cost would include them."""
    block = getattr(block, "base_layer", block)
    parts = [own.attn, *([own.mlp] if own.mlp else own.linears("mlp_in") + own.linears("mlp_out")), *(own.beside or ())]
    known = list(dict.fromkeys(name.partition(".")[0] for name in parts))
    found = [name for name, weight in block.named_parameters(recurse=False) if weight.ndim > 1]
    for name, part in block.named_children():
        if name not in known and any(weight.ndim > 1 for weight in part.parameters()):
            found.append(name)
    if found:
        raise ValueError(
            f"{type(block).__name__} {number} of this model ({kind}) has weight matrices in {', '.join(found)}: this "
            f"is not supported, only {', '.join(known)} can be routed; students/README.md says how to add a record"
        )


def record_in(record: Architecture, block: nn.Module) -> Architecture:
    """Return the record of one block of a model: the first whose modules in front of and in attention it has."""
    if record.hybrid is None or all(_has(block, name) for name in (record.attn, *record.linears("attn_in"))):
        return record
    return record_in(record.hybrid, block)


def scale_of(record: Architecture, block: nn.Module) -> float:
    """Return the factor by which a block multiplies its output, the residual stream included."""
    return 1.0 if record.block_scale is None else float(block.get_buffer(record.block_scale))


def is_hybrid(trunk: nn.Module) -> bool:
    """Return whether blocks of a language model keep a state in place of keys and values."""
    record, blocks = architecture_of(trunk)
    return any(not record_in(record, block).attn_in for block in blocks)


def states_by_kind(trunk: nn.Module) -> dict[str, bool]:
    """Return whether blocks of a hybrid model keep a state, by their types in the config; empty for other models."""
    record, blocks = architecture_of(trunk)
    if record.hybrid is None:
        return {}
    config: Any = trunk.config
    kinds = zip(config.layer_types, blocks, strict=True)
    return {kind: not record_in(record, block).attn_in for kind, block in kinds}


def kind_of(model: nn.Module) -> str:
    """Return the key of a model in `ARCHITECTURES`."""
    return model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__


def trunk_of(model: nn.Module) -> nn.Module:
    """Return the module that holds the blocks: a transformers model without its head, a timm model itself."""
    if not isinstance(model, PreTrainedModel):
        return model
    base: Any = model.base_model
    trunk: nn.Module = base.get_decoder()
    return trunk


@dataclass(frozen=True)
class Latent:
    """Numbers of channels in multi-head latent attention (arXiv 2405.04434)."""

    rank: int
    """Of the latent of a token's keys and values, which all heads share."""
    rotary: int
    """Of the part of a key that carries the position, which all heads share, too."""
    plain: int
    """Of the part of a head's key that comes from the latent."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a block's attention."""

    width: int
    """Width of the residual stream."""
    heads: int
    """Number of query heads."""
    size: int
    """Number of channels of a head's value, and where there is no latent of its query and key."""
    groups: int
    """Number of key/value heads."""
    window: int | None
    """Maximum number of keys that a token attends to in a sliding-window layer; None: no limit."""
    latent: Latent | None = None
    """What is cached in place of keys and values; None: these themselves."""

    @property
    def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (heads, channels) of what a cache holds of a token as keys, and as values."""
        if self.latent is not None:
            return (1, self.latent.rank), (1, self.latent.rotary)
        return (self.groups, self.size), (self.groups, self.size)

    @property
    def per_key(self) -> int:
        """Return the multiply-accumulates of a token's scores and weighted values for one key, all heads together."""
        own = self.size if self.latent is None else self.latent.plain + self.latent.rotary
        return self.heads * (own + self.size)

    @property
    def per_latent(self) -> int:
        """Return the same where queries meet the latents themselves, as they do in decoding; 0: there are none."""
        return 0 if self.latent is None else self.heads * (2 * self.latent.rank + self.latent.rotary)


def sizes_of(model: nn.Module, record: Architecture, number: int, block: nn.Module) -> Sizes:
    """Return the sizes of the attention in `block`, which is block `number` of the model."""
    if not isinstance(model, PreTrainedModel):
        out = record.linears("attn_out")
        attn: Any = block.get_submodule(out[0].rpartition(".")[0])
        width = shape_of(block.get_submodule(out[0]))[0]
        heads = attn.num_heads * len(out)
        return Sizes(width, heads, attn.head_dim, heads, None)
    config, attention = model.config, getattr(block, record.attn, None)
    heads = config.num_attention_heads
    window = None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[number] == "sliding_attention":
        window = config.sliding_window
    elif kinds is None:
        window = getattr(config, "sliding_window", None)
    size = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    latent = None
    if record.expand:
        size = config.v_head_dim
        latent = Latent(config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim)
    groups = heads // getattr(attention, "num_key_value_groups", 1)
    return Sizes(config.hidden_size, heads, size, groups, window, latent)


def windows_of(trunk: nn.Module) -> list[int | None]:
    """Return the width of each block's sliding window, None where there is none."""
    record, blocks = architecture_of(trunk)
    return [sizes_of(trunk, record, number, block).window for number, block in enumerate(blocks)]


def _has(root: nn.Module, path: str) -> bool:
    try:
        return bool(root.get_submodule(path))
    except AttributeError:
        return False


def _get(root: nn.Module, path: str, owner: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"{owner} is not supported: looked for {path!r} in {type(root).__name__}, "
            f"which has {', '.join(name for name, _ in root.named_children())}"
        ) from None


def weight_of(linear: nn.Module) -> Tensor:
    """Return the weight of a linear layer as [out, in], in whichever order it is stored; the layer may be wrapped."""
    base: Any = getattr(linear, "base_layer", linear)
    weight: Tensor = base.weight
    return weight.T if isinstance(base, Conv1D) else weight


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer, which may be wrapped or quantized."""
    base: Any = getattr(linear, "base_layer", linear)
    if isinstance(base, Conv1D):
        inputs, outputs = base.weight.shape
        return outputs, inputs
    return base.out_features, base.in_features


def matrices_of(block: nn.Module, record: Architecture) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the shapes (outputs, inputs) of the matrices that multiply one token in a mixture of experts: those
    for every token, and those of experts, as many as the mixture's router chooses. Where mixtures take the place of
    MLPs, this one may be dense."""
    parts = [block.get_submodule(name) for name in record.beside or (record.mlp,)]
    modules = [module for part in parts for module in getattr(part, "base_layer", part).modules()]
    chosen: Any = next(filter(None, map(_chosen_by, modules)), 0)
    always, some = [], []
    for module in modules:
        if hasattr(module, "in_features"):
            always.append(shape_of(module))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            outputs, *inputs = parameter.shape[-2:]
            if parameter.ndim == 3:
                some += [(outputs, *inputs)] * chosen
            elif parameter.ndim == 2 and name == "weight":
                always.append((outputs, *inputs))
    return always, some


def _chosen_by(router: nn.Module) -> Any:
    return getattr(router, "top_k", None) or getattr(getattr(router, "config", None), "top_k_experts", 0)


def mixer_macs(mixer: nn.Module) -> int:
    """Return the multiply-accumulates for one token of what a block has in place of attention: its linear layers, its
    convolution over the last tokens, and products with its state. Those are three for a delta rule's [heads, d_k, d_v]
    (what it holds for the key, what is written, and what it holds for the query), and the last two of them for Mamba
    2's [heads, d, states]."""
    macs = 0
    for module in mixer.modules():
        if hasattr(module, "in_features"):
            macs += math.prod(shape_of(module))
        elif isinstance(module, nn.Conv1d):
            macs += module.weight.numel()
    state: list[int] = [getattr(mixer, name, 0) for name in ("num_v_heads", "head_k_dim", "head_v_dim")]
    mamba: list[int] = [getattr(mixer, name, 0) for name in ("num_heads", "head_dim", "ssm_state_size")]
    return macs + 3 * math.prod(state) + 2 * math.prod(mamba)


def can_be_read_in_part(linear: nn.Module) -> bool:
    """Return whether single rows and columns of a linear layer's weight can be read: not if it is quantized, in a
    layout that only the quantization library knows."""
    base: Any = getattr(linear, "base_layer", linear)
    return type(base.weight) in (Tensor, nn.Parameter) and base.weight.is_floating_point()


@torch.no_grad()
def values_of(linear: nn.Module) -> Tensor:
    """Return the weight of a linear layer [out, in] in float32. A quantized weight is recovered as the layer's outputs,
    less the bias, for the rows of an identity matrix."""
    if can_be_read_in_part(linear):
        return weight_of(linear).float()
    base: Any = getattr(linear, "base_layer", linear)
    like = base.weight if base.weight.is_floating_point() else torch.empty(0, device=base.weight.device)
    out: Tensor = base(torch.eye(base.in_features, dtype=like.dtype, device=like.device)).float()
    return (out if base.bias is None else out - base.bias.float()).T
