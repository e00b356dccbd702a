"""The closed-form start of image-token routers, from the gradients of the gates in front of the language model.

As in students/calibration/image.py: the Fisher estimate of what closing a gate costs in nats, here of the answer's
tokens, is what the router predicts from the token at the pruning point. Routers in the two towers start open.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from students.calibration.data_shard import DataShard, batch_generator
from students.calibration.price import Curve, Start, gate_costs, gated_choice, log_likelihood, start_at
from students.families.vision_language import VisionLanguageStudent

CALIBRATED = 4
"""Questions that are looked at together."""
DRAWS = 2
"""Answers that are drawn for each prompt."""


def calibrate_image_router(
    student: VisionLanguageStudent,
    batches: Sequence[tuple[dict[str, Any], Tensor, Tensor]],
    targets: Sequence[float],
    tokens: tuple[int, int],
    seed: int = 0,
    shard: DataShard | None = None,
    seen: tuple[Tensor, Tensor] | None = None,
) -> Start:
    """Start the router of image tokens at the price that reaches the middle of the targets, one or several, ascending.

    batches: (what `features` is called with, answers [B, T] bool: tokens after which the answer is said, image [B, T]
    bool). tokens: (text, image) of a prompt. shard: which of the batches of all processes these are (None: all).
    seen: what `observe_image_tokens` saw in them, with the same seed.
    """
    x, cost = observe_image_tokens(student, batches, seed, shard or DataShard()) if seen is None else seen
    compute = student.uniform(1.0, tokens, "prefill")
    assert student.image_router is not None
    choice = gated_choice(student.image_router, x, cost, compute - student.uniform(0.0, tokens, "prefill"))
    return start_at([choice], Curve([choice]), [compute] * len(targets), targets)


def observe_image_tokens(
    student: VisionLanguageStudent,
    batches: Sequence[tuple[dict[str, Any], Tensor, Tensor]],
    seed: int,
    shard: DataShard,
) -> tuple[Tensor, Tensor]:
    """What the router reads [rows, D], and what closing its gate would cost [rows, 1], of the image tokens of all
    processes."""
    run, seen = student.runtime, []
    try:
        for (inputs, answers, image), info in shard.enumerate(batches):
            generator = batch_generator(seed, info.index)
            run.probed = {}
            with torch.enable_grad():
                logits, _ = student.logits(student.features(**inputs)[0].last_hidden_state[answers])
                gate, x = run.probed["image"]
                (cost,) = gate_costs(partial(log_likelihood, logits, generator), [gate], DRAWS)
            seen.append((info.counted(x[image].float()), info.counted(cost[image].unsqueeze(-1))))
    finally:
        run.probed = None
        run.drop()
    read, costs = (shard.all_gather(part) for part in zip(*seen, strict=True))
    return read, costs
