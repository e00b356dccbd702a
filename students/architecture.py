"""Where the parts of a transformer block are called what: one record of names per architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Architecture:
    """Names of modules, as attribute paths: `blocks` from the base model, `attn`..`mlp_exit` from a block, the
    linear layers from their branch."""

    blocks: str = "layers"
    attn: str = "self_attn"
    mlp: str = "mlp"
    attn_in: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attn_out: tuple[str, ...] = ("o_proj",)
    mlp_in: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_out: tuple[str, ...] = ("down_proj",)
    attn_exit: str | None = None
    """The branch's last module where that is not the branch itself (post-norms): gates act after it."""
    mlp_exit: str | None = None
    prenorm: bool = True
    """Whether the branch reads a normalised input; where it does not, routers normalise for themselves."""
    norm: str = "input_layernorm"
    """The norm in front of attention, for language models that have one."""
    whole_heads: bool = False
    """Whether no head can be left out: queries are normalised over all heads, or attention passes no plan on."""
    causal: bool = True
    """Whether a token sees only what is before it (language), or everything (images)."""
    mask: str = "attention_mask"
    """The keyword under which blocks and attention take a mask."""
    prefix: int | None = 0
    """Images: class, distillation and register tokens in front of the patches; None: the model says how many."""

    def linears(self, site: str) -> list[str]:
        """Names of the linear layers at a site, from the block."""
        branch = self.attn if site.startswith("attn") else self.mlp
        return [f"{branch}.{name}" for name in getattr(self, site)]


_LLAMA = Architecture()
_GEMMA = replace(_LLAMA, attn_exit="post_attention_layernorm", mlp_exit="post_feedforward_layernorm")

_VIT = replace(_LLAMA, attn="attention", mlp_in=("fc1",), mlp_out=("fc2",), causal=False, prefix=1)
_CLIP = replace(_VIT, blocks="encoder.layers", attn="self_attn", attn_out=("out_proj",))
_TIMM = replace(_VIT, blocks="blocks", attn="attn", attn_in=("qkv",), attn_out=("proj",), mask="attn_mask", prefix=None)

VISION_TOWERS = {
    "llava": "vision_tower",
    "llava_next": "vision_tower",
    "paligemma": "vision_tower",
    "idefics3": "vision_model",
    "smolvlm": "vision_model",
    "qwen2_vl": "visual",
    "qwen2_5_vl": "visual",
}
"""Vision-language models by `model_type`, and where their base model keeps the vision tower."""

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gemma": _LLAMA,
    "qwen2_vl_text": _LLAMA,
    "qwen2_5_vl_text": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": replace(_GEMMA, prenorm=False, whole_heads=True),
    "phi3": replace(_LLAMA, attn_in=("qkv_proj",), mlp_in=("gate_up_proj",)),
    "gpt2": Architecture("h", "attn", "mlp", ("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",), norm="ln_1"),
    "gpt_neox": Architecture(
        "layers", "attention", "mlp", ("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)
    ),
    "vit": _VIT,
    "deit": replace(_VIT, prefix=2),
    "dinov2": replace(_VIT, blocks="encoder.layer"),
    "vit_mae": _VIT,
    "clip_vision_model": _CLIP,
    "siglip_vision_model": replace(_CLIP, prefix=0, whole_heads=True),
    "VisionTransformer": _TIMM,
    "Eva": _TIMM,
}
"""Keyed by the config's `model_type`, or for models of timm by the name of their class."""


def architecture_of(model: nn.Module) -> tuple[Architecture, list[nn.Module]]:
    """The record that fits a model, and its blocks.

    Raises ValueError where no record fits, or a module that the record names is missing.
    """
    kind = kind_of(model)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{type(model).__name__} (model_type {kind!r}) is not supported: looked for a record of module names in "
            f"students/architecture.py, which has {', '.join(ARCHITECTURES)}"
        )
    record = ARCHITECTURES[kind]
    if record.prefix is None:
        record = replace(record, prefix=model.num_prefix_tokens)
    blocks = list(_get(trunk_of(model), record.blocks, type(model).__name__))
    if kind == "Eva":  # whose layers differ from model to model
        if getattr(blocks[0].attn, "qkv", None) is None:
            record = replace(record, attn_in=_LLAMA.attn_in)
        if hasattr(blocks[0].mlp, "fc1_g"):
            record = replace(record, mlp_in=("fc1_g", "fc1_x"))
    for block in blocks[:1]:
        names = [record.attn, record.mlp, record.attn_exit, record.mlp_exit]
        names += [record.norm] if record.causal and record.prenorm else []
        names += [name for site in ("attn_in", "attn_out", "mlp_in", "mlp_out") for name in record.linears(site)]
        for name in filter(None, names):
            _get(block, name, type(model).__name__)
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
        attn = block.get_submodule(record.attn)
        width = weight_of(block.get_submodule(record.linears("attn_out")[0])).shape[0]
        return Sizes(width, attn.num_heads, attn.head_dim, attn.num_heads, None)
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
    linear = getattr(linear, "base_layer", linear)
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight
