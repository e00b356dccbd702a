"""Names of the parts of a transformer block. Specifications are checked by them before torch is imported."""

from typing import Literal

Branch = Literal["attn", "mlp"]
BRANCHES: tuple[Branch, ...] = ("attn", "mlp")
LINEAR_SITES = ("attn_in", "attn_out", "mlp_in", "mlp_out")
"""The four sites of a block, each with linear layers that read the same input: q/k/v, o, gate/up, down."""
