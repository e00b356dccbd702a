"""The closed-form start of image models: what closing each gate would cost, from the gradients of the gates.

As in students/calibration/language.py, a gate is closed where cost < price * saving, the cost being the Fisher estimate
of the KL divergence, here for the gate itself: E[g^2] / 2, with g the gradient of log p(y) with respect to the gate, y
drawn from the model. A model without a classifier stands for a Gaussian around its features, of their own length.

Where dropped tokens stay away, the gate of a block is the gate of all later ones, and what it saves is theirs too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from students.calibration.price import Choice, Curve, Start, gated_choice, log_likelihood, start_at
from students.families.image import ImageStudent, Placed

DRAWS = 4
"""Outcomes y that are drawn for each image."""
ROWS_PER_BATCH = 1024
"""Tokens of a batch that a router's start is fitted to."""


def calibrate_images(
    student: ImageStudent, batches: Sequence[Tensor], target: float | Sequence[float], seed: int = 0
) -> Start:
    """Start all routers at the price that reaches `target`, or between several. batches: pixels [B, C, H, W]."""
    targets = [target] if isinstance(target, float) else target
    generator = torch.Generator().manual_seed(seed)
    seen = _observe(student, batches, generator)
    ones = torch.ones(1, student.tokens, dtype=torch.bool)
    dense = float(student.compute.dense(ones, "prefill").sum()) / student.tokens
    layers, rest = [], []
    for placed in student.routers():
        if placed.key in seen:
            (rest if placed.branch else layers).append(placed)
    choices = [_choice(student, placed, *seen[placed.key], dense) for placed in rest]
    choices += _layer_choices(student, layers, seen, dense)
    compute = student.compute.uniform(1.0, student.tokens, "prefill")
    return start_at(choices, Curve(choices), [compute] * len(targets), targets)


def _observe(
    student: ImageStudent, batches: Sequence[Tensor], generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each router what it reads [rows, D] and its gates' costs [rows, N], of sampled tokens."""
    run, seen = student.runtime, {}
    before = run.execution
    run.execution = "mask"
    try:
        for pixels in batches:
            run.probed = {}
            with torch.enable_grad():
                features, _ = student.features(pixels)
                keys = list(run.probed)
                gates = [run.probed[key][0] for key in keys]
                draws = [
                    torch.autograd.grad(_log_likelihood(features, generator), gates, retain_graph=True)
                    for _ in range(DRAWS)
                ]
            grads = {key: torch.stack(parts).float() for key, parts in zip(keys, zip(*draws, strict=True), strict=True)}
            picked = None
            for key in keys:
                x, cost = run.probed[key][1], grads[key].pow(2).mean(0) / 2
                cost = cost.unsqueeze(-1) if cost.ndim == 2 else cost
                x, cost = (part[:, run.prefix if part.shape[1] > 1 else 0 :] for part in (x, cost))
                if cost.shape[1] == 1:  # one decision for all tokens
                    x = x.mean(1, keepdim=True)
                    seen.setdefault(key, []).append((x[:, 0].float(), cost[:, 0]))
                    continue
                if picked is None:
                    picked = torch.randperm(x.shape[:2].numel(), generator=generator)[:ROWS_PER_BATCH].to(x.device)
                seen.setdefault(key, []).append((x.flatten(0, 1)[picked].float(), cost.flatten(0, 1)[picked]))
    finally:
        run.probed, run.execution = None, before
        run.drop()
    return {key: tuple(torch.cat(part) for part in zip(*parts, strict=True)) for key, parts in seen.items()}


def _log_likelihood(features: object, generator: torch.Generator) -> Tensor:
    """Sum over images of log p(y), y drawn from the model's own distribution."""
    if features.logits is None:
        pooled = features.pooled.float()
        noise = torch.randn(pooled.shape, generator=generator).to(pooled.device)
        return (pooled / pooled.detach().norm(dim=-1, keepdim=True) * noise).sum()
    return log_likelihood(features.logits, generator)


def _layer_choices(
    student: ImageStudent, routers: list[Placed], seen: dict[str, tuple[Tensor, Tensor]], dense: float
) -> list[Choice]:
    """Whole blocks. Where tokens stay away, a token is gone from the first block on that can spare it."""
    choices, lowest = [], None
    blocks = range(len(student.blocks))
    ends = [*(placed.block for placed in routers), len(student.blocks)][1:]
    for placed, following in zip(routers, ends, strict=True):
        number = placed.block
        own = sum(_block_macs(student, n) for n in (range(number, following) if student.stays else [number])) / dense
        tail = sum(_block_macs(student, n) for n in blocks[number:]) / dense if student.stays else own
        choice = gated_choice(placed.router, *seen[placed.key], tail)
        ratio = choice.cost / tail
        lowest = ratio if lowest is None or not student.stays else torch.minimum(lowest, ratio)
        choices.append(Choice(lowest * own, own, choice.apply))
    return choices


def _block_macs(student: ImageStudent, number: int) -> float:
    """Cost of a block for one token."""
    block = student.compute.blocks[number]
    return block.q + block.kv + block.o + block.mlp_in + block.mlp_out + block.per_key * student.tokens


def _choice(student: ImageStudent, placed: Placed, x: Tensor, cost: Tensor, dense: float) -> Choice:
    """A router of a branch, or of its heads or groups."""
    block = student.compute.blocks[placed.block]
    attention = block.q + block.kv + block.o + block.per_key * student.tokens
    whole = attention if placed.branch == "attn" else block.mlp_in + block.mlp_out
    return gated_choice(placed.router, x, cost, whole / placed.router.gates / dense)
