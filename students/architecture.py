"""Where the parts of a decoder block are called what: one record of names per architecture."""

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
    norms_all_heads: bool = False
    """Whether queries are normalised over all heads together, so that none can be left out."""

    def linears(self, site: str) -> list[str]:
        """Names of the linear layers at a site, from the block."""
        branch = self.attn if site.startswith("attn") else self.mlp
        return [f"{branch}.{name}" for name in getattr(self, site)]


_LLAMA = Architecture()
_GEMMA = replace(_LLAMA, attn_exit="post_attention_layernorm", mlp_exit="post_feedforward_layernorm")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": replace(_GEMMA, prenorm=False, norms_all_heads=True),
    "phi3": replace(_LLAMA, attn_in=("qkv_proj",), mlp_in=("gate_up_proj",)),
    "gpt2": Architecture("h", "attn", "mlp", ("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",)),
    "gpt_neox": Architecture(
        "layers", "attention", "mlp", ("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)
    ),
}
"""Keyed by the config's `model_type`."""


def architecture_of(model: PreTrainedModel) -> tuple[Architecture, list[nn.Module]]:
    """The record that fits a model, and its blocks.

    Raises ValueError where no record fits, or a module that the record names is missing.
    """
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{type(model).__name__} (model_type {kind!r}) is not supported: looked for a record of module names in "
            f"students/architecture.py, which has {', '.join(ARCHITECTURES)}"
        )
    record = ARCHITECTURES[kind]
    blocks = list(_get(model.base_model, record.blocks, type(model).__name__))
    for block in blocks[:1]:
        names = [record.attn, record.mlp, record.attn_exit, record.mlp_exit]
        names += [name for site in ("attn_in", "attn_out", "mlp_in", "mlp_out") for name in record.linears(site)]
        for name in filter(None, names):
            _get(block, name, type(model).__name__)
    return record, blocks


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
