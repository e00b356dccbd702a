"""The record of an architecture: what the modules of its transformer blocks are called."""

from __future__ import annotations

from dataclasses import dataclass

from students.sites import LINEAR_SITES


@dataclass(frozen=True)
class Architecture:
    """Names and properties of the modules in an architecture; the defaults are Llama's.

    Names are attribute paths: `blocks` relative to the base model; `attn`, `mlp`, `attn_exit`, `mlp_exit` and `norm`
    relative to a block; linear layers (`attn_in` ... `mlp_out`) and `activation` relative to their branch. Without
    `mlp_in` and `mlp_out`, MLPs are mixtures of experts, in all blocks or some; they run whole, or not at all. Without
    `attn_in` and `attn_out`, `attn` is no attention but a mixer with a state (see `hybrid`); it always runs whole. An
    empty `mlp`: the block itself runs the linear layers of its MLP, which no token can skip.
    """

    blocks: str = "layers"
    attn: str = "self_attn"
    mlp: str = "mlp"
    attn_in: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attn_out: tuple[str, ...] = ("o_proj",)
    mlp_in: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_out: tuple[str, ...] = ("down_proj",)
    activation: str | None = "act_fn"
    """The activation function of a gated MLP whose gate and up are separate linear layers; None: it is no module."""
    beside: tuple[str, str] | None = None
    """The model's router and its experts, relative to a block, that stand beside a dense MLP and are added to it: in
    front of `mlp_exit`, or without one by the block, which calls their mixture with the MLP's input. Where a model has
    none, this is None."""
    attn_exit: str | None = None
    """The post-norm behind attention, after which gates are applied; None: the branch has no module behind it."""
    mlp_exit: str | None = None
    """The same for the MLP."""
    prenorm: bool = True
    """Whether branches read a normalised input; if not, routers normalise their input themselves."""
    expand: tuple[str, ...] = ()
    """Multi-head latent attention (arXiv 2405.04434, section 2.1): linear layers behind `attn_in`, of which the last
    makes the keys and values of all heads from the latents that are cached in their place, and the one before it, if
    any, makes queries from a latent. They always run whole. Empty: `attn_in` writes queries, keys and values."""
    norm: str = "input_layernorm"
    """The norm in front of attention; used for language models with `prenorm`."""
    residual_scale: str | None = None
    """Config key of the factor of a branch's output, applied before the output is added to the residual stream."""
    logit_scale: str | None = None
    """Config key of the factor of the logits."""
    logit_divisor: str | None = None
    """Config key of the divisor of the logits."""
    logit_cap: str | None = None
    """Config key of the soft cap c of the logits, c * tanh(logits / c) (Gemma 2, arXiv 2408.00118)."""
    mlp_pair: bool = False
    """Whether the MLP returns a tuple, as attention does, of which the first is added to the residual stream."""
    whole_heads: bool = False
    """Whether closed heads must be computed all the same: because queries are normalised over all heads or by a norm of
    each head's own, each head has a sink, or attention asks for all of them, or does not hand further keyword arguments
    on to its attention function."""
    block_scale: str | None = None
    """The buffer by which a block multiplies its whole output, the residual stream included, before it returns it."""
    side_by_side: bool = False
    """Whether a block has several attentions that read one input, then several MLPs that read one input: only whole
    blocks can be routed."""
    hybrid: Architecture | None = None
    """The record of the blocks that lack a module of this one: they have linear attention, Mamba 2 or a short
    convolution in place of attention, whose state has to see every token, or keys that are values, too; None: there are
    none."""
    without: tuple[str, ...] = ()
    """Config keys that switch on parts which are not supported."""
    causal: bool = True
    """Whether attention is causal (language models) or bidirectional (image models)."""
    mask: str = "attention_mask"
    """The keyword by which blocks and attention take a mask."""
    prefix: int | None = 0
    """Image models: number of class, distillation and register tokens in front of the patches; None: it differs, and is
    read from the model."""

    @property
    def mixes(self) -> bool:
        """Whether there are mixtures of experts."""
        return not self.mlp_in or self.beside is not None

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of `LINEAR_SITES` that blocks have."""
        return tuple(site for site in LINEAR_SITES if getattr(self, site))

    def linears(self, site: str) -> list[str]:
        """Return the names of the linear layers at a site or in `expand`, relative to the block."""
        branch = self.mlp if site.startswith("mlp") else self.attn
        return [f"{branch}.{name}".lstrip(".") for name in getattr(self, site)]
