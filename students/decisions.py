"""What a forward pass decided."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from students.spec import RouterSpec


@dataclass
class Decisions:
    """What one forward pass decided. Keys: "3.attn.token", "3.layer", "3.attn.head", "3.mlp.expert",
    "3.mlp_in.channel", "vocab". All tensors are differentiable with respect to the routers."""

    share: dict[str, Tensor] = field(default_factory=dict)
    """Open share of each router's gates per token [B, T] (or [B, 1], [1, 1] where it is the same for all)."""
    score: dict[str, Tensor] = field(default_factory=dict)
    """Scores of the gated routers [B, T, N], for the losses that read them."""
    spec: dict[str, RouterSpec] = field(default_factory=dict)
    """Of the router that decided, by the same keys; an image model's blocks without one have none."""
    bypassed: bool = False
    """Nothing was decided: the frozen model ran."""
    index: Tensor | None = None
    """[B, L] vision-language models: which token of the input each row of the output is; None: all are there."""
    valid: Tensor | None = None
    """[B, L] vision-language models: how far each of them is there: 0 for filling, or gates, for masks."""
    vision: Decisions | None = None
    """Vision-language models: what routers in the vision tower decided, also to be found under "vision." above."""
