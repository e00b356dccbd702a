"""Losses of self-distillation: pure functions on tensors that know no model."""

from losses.divergence import (
    DIVERGENCES,
    chunked,
    default_chunk_rows,
    forward_kl,
    jensen_shannon,
    mean_divergence,
    reverse_kl,
    top_of,
    topk_kl,
    topk_kl_to,
)
from losses.hidden import HIDDEN_DISTANCES, cosine_distance, mse, per_layer, relative_mse
from losses.routing import budget_price, budget_prices, capacity_hinge, load_balance, topk_bce

__all__ = [
    "DIVERGENCES",
    "HIDDEN_DISTANCES",
    "budget_price",
    "budget_prices",
    "capacity_hinge",
    "chunked",
    "cosine_distance",
    "default_chunk_rows",
    "forward_kl",
    "jensen_shannon",
    "load_balance",
    "mean_divergence",
    "mse",
    "per_layer",
    "relative_mse",
    "reverse_kl",
    "top_of",
    "topk_bce",
    "topk_kl",
    "topk_kl_to",
]
