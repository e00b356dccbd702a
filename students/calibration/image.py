"""The closed-form start of image models: the cost of closing each gate, estimated from the gradients of the gates.

As in students/calibration/language.py, a gate is closed where cost < price * saving, the cost being the Fisher estimate
of the KL divergence, here for the gate itself: E[g^2] / 2, with g the gradient of log p(y) with respect to the gate, y
drawn from the model. A model without a classifier is taken to predict a Gaussian around its pooled features, whose
standard deviation is the features' norm.

Where dropped tokens do not return, closing a block's gate skips all later blocks for the token, too, and their cost
counts as saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from students.calibration.data_shard import DataShard, batch_generator
from students.calibration.price import Choice, Curve, Start, gate_costs, gated_choice, log_likelihood, start_at
from students.families.image import Features, ImageStudent, Placed

CALIBRATED = 64
"""Images in a calibration batch."""
DRAWS = 4
"""Outcomes y drawn for each image."""
ROWS_PER_BATCH = 1024
"""Tokens sampled from a batch, to which a router's start is fitted."""
Seen = dict[str, tuple[Tensor, Tensor]]
"""Observations by the router's key: the features that it reads [rows, D] and its gates' costs [rows, N] in nats."""


def calibrate_images(student: ImageStudent, seen: Seen, size: Sequence[int], targets: Sequence[float]) -> Start:
    """Initialise all routers at the price that reaches the target, or at the geometric mean of the prices of the first
    and the last of several targets.

    seen: the result of `observe_images` for images of this size (height, width).
    """
    tokens, compute = student.at(size)
    dense = float(compute.dense(torch.ones(1, tokens, dtype=torch.bool), "prefill").sum()) / tokens
    images, choices = ImageStart(student, seen, tokens, dense), []
    for spec in student.spec.at("block"):
        routers = [placed for placed in student.routers() if placed.router.spec is spec and placed.key in seen]
        choices += spec.of_kind.start_images(images, routers)
    whole = student.uniform(1.0, size, "prefill")
    return start_at(choices, Curve(choices), [whole] * len(targets), targets)


def observe_images(student: ImageStudent, batches: Sequence[Tensor], seed: int, shard: DataShard) -> Seen:
    """Return the observations (see Seen) of each router for tokens sampled from the batches of all processes."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    run = student.runtime
    before = run.execution
    run.execution = "mask"
    try:
        for pixels, info in shard.enumerate(batches):
            generator = batch_generator(seed, info.index)
            run.probed = {}
            with torch.enable_grad():
                features, _ = student.features(pixels)
                likelihood = partial(_log_likelihood, features, generator)
                costs = gate_costs(likelihood, [gate for gate, _ in run.probed.values()], DRAWS)
            picked = None
            for (key, (_, x)), cost in zip(run.probed.items(), costs, strict=True):
                cost = cost.unsqueeze(-1) if cost.ndim == 2 else cost
                x, cost = (part[:, run.prefix if part.shape[1] > 1 else 0 :] for part in (x, cost))
                if cost.shape[1] == 1:  # one decision for all tokens
                    read, cost = x.mean(1).float(), cost[:, 0]
                else:
                    if picked is None:
                        picked = torch.randperm(x.shape[:2].numel(), generator=generator)[:ROWS_PER_BATCH].to(x.device)
                    read, cost = x.flatten(0, 1)[picked].float(), cost.flatten(0, 1)[picked]
                seen.setdefault(key, []).append((info.counted(read), info.counted(cost)))
    finally:
        run.probed, run.execution = None, before
        run.drop()
    return {
        key: (shard.all_gather([read for read, _ in parts]), shard.all_gather([cost for _, cost in parts]))
        for key, parts in seen.items()
    }


def _log_likelihood(features: Features, generator: torch.Generator) -> Tensor:
    """Return the sum over images of log p(y), with y drawn from the model's own distribution."""
    if features.logits is None:
        pooled = features.pooled.float()
        noise = torch.randn(pooled.shape, generator=generator).to(pooled.device)
        unit: Tensor = pooled / pooled.detach().norm(dim=-1, keepdim=True)
        return (unit * noise).sum()
    return log_likelihood(features.logits, generator)


class ImageStart:
    """An image model's student whose routers are to be initialised, with the observations of their gates."""

    def __init__(self, student: ImageStudent, seen: Seen, tokens: int, dense: float) -> None:
        self.student, self._seen, self._tokens, self._dense = student, seen, tokens, dense

    def branch(self, number: int, branch: str) -> float:
        """Return the cost of a block's branch for one token, as a share of the whole model's cost for one token."""
        block = self.student.compute.blocks[number]
        attention = block.q + block.kv + block.o + block.per_key * self._tokens
        return (attention if branch == "attn" else block.mlp_in + block.mlp_out) / self._dense

    def block(self, number: int) -> float:
        """Return the cost of a block for one token, as a share of the whole model's cost for one token."""
        return self.branch(number, "attn") + self.branch(number, "mlp")

    def choice(self, placed: Placed, saving: float) -> Choice:
        """Return the choice of a router that learns to predict its gates' costs; saving: of one gate, as a share."""
        return gated_choice(placed.router, *self._seen[placed.key], saving)
