"""Where the parts of a transformer block are called what: one record of names per architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Branch = Literal["attn", "mlp"]
BRANCHES: tuple[Branch, ...] = ("attn", "mlp")
LINEAR_SITES = ("attn_in", "attn_out", "mlp_in", "mlp_out")
"""The four places of a block where linear layers read one input: q/k/v, o, gate/up, down."""


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
    activation: str = "act_fn"
    """The module between gate and up, where both are linear layers of their own."""
    attn_exit: str | None = None
    """The branch's last module where that is not the branch itself (post-norms): gates act after it."""
    mlp_exit: str | None = None
    prenorm: bool = True
    """Whether the branch reads a normalised input; where it does not, routers normalise for themselves."""
    norm: str = "input_layernorm"
    """The norm in front of attention, for language models that have one."""
    residual_scale: str | None = None
    """The config's name for what a branch's output is multiplied by before it is added to the residual stream."""
    logit_scale: str | None = None
    """The config's name for what logits are multiplied by; logit_divisor: for what they are divided by."""
    logit_divisor: str | None = None
    logit_cap: str | None = None
    """The config's name for the bound c of logits c * tanh(logits / c) (Gemma 2, arXiv 2408.00118)."""
    whole_heads: bool = False
    """Whether no head can be left out: queries are normalised over all heads, or attention passes no plan on."""
    side_by_side: bool = False
    """Whether a block has several attentions, then several MLPs, that read one input each: only whole blocks are
    routed."""
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
