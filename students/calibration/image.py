"""The closed-form start of image models: what closing each gate would cost, from the gradients of the gates.

As in students/calibration/language.py, a gate is closed where cost < price * saving, the cost being the Fisher estimate
of the KL divergence, here for the gate itself: E[g^2] / 2, with g the gradient of log p(y) with respect to the gate, y
drawn from the model. A model without a classifier stands for a Gaussian around its features, of their own length.

Where dropped tokens stay away, the gate of a block is the gate of all later ones, and what it saves is theirs too.
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
"""Images that are looked at together."""
DRAWS = 4
"""Outcomes y that are drawn for each image."""
ROWS_PER_BATCH = 1024
"""Tokens of a batch that a router's start is fitted to."""
Seen = dict[str, tuple[Tensor, Tensor]]
"""For each router what it reads [rows, D] and its gates' costs [rows, N]."""


def calibrate_images(
    student: ImageStudent,
    batches: Sequence[Tensor],
    target: float | Sequence[float],
    seed: int = 0,
    shard: DataShard | None = None,
    seen: Seen | None = None,
) -> Start:
    """Start all routers at the price that reaches `target`, or between several.

    batches: pixels [B, C, H, W]; shard: which of the batches of all processes they are (None: all). seen: what
    `observe_images` saw in them, with the same seed and the same routers.
    """
    targets = [target] if isinstance(target, float) else target
    seen = observe_images(student, batches, seed, shard or DataShard()) if seen is None else seen
    size = batches[0].shape[-2:]
    tokens, compute = student.at(size)
    dense = float(compute.dense(torch.ones(1, tokens, dtype=torch.bool), "prefill").sum()) / tokens
    images, choices = ImageStart(student, seen, tokens, dense), []
    for spec in student.spec.at("block"):
        routers = [placed for placed in student.routers() if placed.router.spec is spec and placed.key in seen]
        choices += spec.of_kind.start_images(images, routers)
    whole = student.uniform(1.0, size, "prefill")
    return start_at(choices, Curve(choices), [whole] * len(targets), targets)


def observe_images(student: ImageStudent, batches: Sequence[Tensor], seed: int, shard: DataShard) -> Seen:
    """For each router what it reads [rows, D] and its gates' costs [rows, N], of sampled tokens of all processes."""
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
    """Sum over images of log p(y), y drawn from the model's own distribution."""
    if features.logits is None:
        pooled = features.pooled.float()
        noise = torch.randn(pooled.shape, generator=generator).to(pooled.device)
        unit: Tensor = pooled / pooled.detach().norm(dim=-1, keepdim=True)
        return (unit * noise).sum()
    return log_likelihood(features.logits, generator)


class ImageStart:
    """An image model's student whose routers are to be started, and what was seen of their gates."""

    def __init__(
        self, student: ImageStudent, seen: dict[str, tuple[Tensor, Tensor]], tokens: int, dense: float
    ) -> None:
        self.student, self._seen, self._tokens, self._dense = student, seen, tokens, dense

    def branch(self, number: int, branch: str) -> float:
        """Cost of a block's branch for one token, as a share of the model's."""
        block = self.student.compute.blocks[number]
        attention = block.q + block.kv + block.o + block.per_key * self._tokens
        return (attention if branch == "attn" else block.mlp_in + block.mlp_out) / self._dense

    def block(self, number: int) -> float:
        """Cost of a block for one token."""
        return self.branch(number, "attn") + self.branch(number, "mlp")

    def choice(self, placed: Placed, saving: float) -> Choice:
        """A router that predicts what its gates cost."""
        return gated_choice(placed.router, *self._seen[placed.key], saving)
