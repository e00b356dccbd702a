"""The record of a forward pass's routing decisions."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from students.spec import RouterSpec


@dataclass
class Decisions:
    """Routing decisions of one forward pass, by key: "3.attn.token", "3.layer", "3.attn.head", "3.mlp.expert",
    "3.mlp.neuron", "3.mlp.mixture", "3.mlp_in.channel" (3: the block's number), "vocab". Tensors are differentiable
    with respect to the routers' parameters."""

    share: dict[str, Tensor] = field(default_factory=dict)
    """Share of each router's gates that are open, per token [B, T] (or [B, 1], [1, 1] if it is the same for all)."""
    score: dict[str, Tensor] = field(default_factory=dict)
    """Scores [B, T, N] of the routers that have scores, for the losses that read them."""
    spec: dict[str, RouterSpec] = field(default_factory=dict)
    """Specifications of the routers; image models have shares, but no entry here, of blocks without a router."""
    bypassed: bool = False
    """Whether routers were bypassed, so that the frozen model ran and nothing was decided."""
    index: Tensor | None = None
    """Vision-language models: index [B, L] into the input of each token of the output; None: no token was pruned."""
    valid: Tensor | None = None
    """Vision-language models: presence [B, L] of each token of the output: 1, or 0 for padding; where closed image
    tokens are masked instead of pruned, their gates."""
    vision: Decisions | None = None
    """Vision-language models: decisions of the vision tower; `share`, `score`, `spec` have them under "vision." too."""
