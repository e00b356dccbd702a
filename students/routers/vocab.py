"""The router of rows of the LM head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.routers.base import Added


class VocabRouter(Added):
    """Chooses rows of the LM head for each token: a rank-r preview of all logits, exact rows above a learned limit.

    The preview (W up) f of a hidden state h, with W [V, D] the head's weight and f = down h, costs r (D + V) instead of
    D V. A row is computed exactly where its preview reaches the limit slope . f + spread |f|, which is about `spread`
    standard deviations above the mean of the token's logits; the other logits are preview + tail. Previewing the
    softmax with a truncated head is SVD-Softmax's idea (NIPS 2017). Here, down, up and slope are fitted to hidden
    states in closed form and then stay fixed; spread and tail are trained.
    """

    down: Tensor
    up: Tensor
    slope: Tensor

    def __init__(self, width: int, rank: int, gains: bool = False) -> None:
        super().__init__()
        self.log_gain = nn.Parameter(torch.zeros(())) if gains else None
        self.register_buffer("down", torch.zeros(rank, width))
        self.register_buffer("up", torch.zeros(width, rank))
        self.register_buffer("slope", torch.zeros(rank))
        self.spread = nn.Parameter(torch.zeros(()))
        self.tail = nn.Parameter(torch.zeros(()))

    def preview_weight(self, weight: Tensor) -> Tensor:
        """Return the product [V, r] of the head's weight [V, D] and `up`, which maps features to previews of logits."""
        return weight @ self.up.to(weight.dtype)

    def features(self, hidden: Tensor) -> Tensor:
        """Return features f [..., r] of final hidden states [..., D]."""
        return F.linear(hidden, self.down.to(hidden.dtype))

    def limit(self, features: Tensor, spread: Tensor, gain: Tensor | float, dial: Tensor | float) -> Tensor:
        """Return the limit [..., 1] of each token's preview, given features f [..., r], at this offset; float32.

        Zero parameters open every row.
        """
        features = features.float()
        limit: Tensor = (features @ self.slope + spread * features.norm(dim=-1)).unsqueeze(-1) - gain * dial
        return limit
