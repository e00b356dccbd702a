"""The closed-form start of image-token routers, from the gradients of the gates in front of the language model.

As in students/calibration/image.py, the router predicts the Fisher estimate of a gate's cost in nats, here on the
answer's tokens, from the token at the pruning point. Routers in the vision tower and the language model start open.
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
"""Questions in a calibration batch."""
DRAWS = 2
"""Answers drawn for each prompt."""


def calibrate_image_router(
    student: VisionLanguageStudent, seen: tuple[Tensor, Tensor], tokens: tuple[int, int], targets: Sequence[float]
) -> Start:
    """Initialise the image-token router at the price that reaches the target, or at the geometric mean of the prices of
    the first and the last of several targets, ascending.

    seen: the result of `observe_image_tokens`. tokens: numbers of text and image tokens in a prompt.
    """
    compute = student.uniform(1.0, tokens, "prefill")
    assert student.image_router is not None
    choice = gated_choice(student.image_router, *seen, compute - student.uniform(0.0, tokens, "prefill"))
    return start_at([choice], Curve([choice]), [compute] * len(targets), targets)


def observe_image_tokens(
    student: VisionLanguageStudent,
    batches: Sequence[tuple[dict[str, Any], Tensor, Tensor]],
    seed: int,
    shard: DataShard,
) -> tuple[Tensor, Tensor]:
    """Return the features that the router reads [rows, D] and the costs [rows, 1] in nats of closing its gate, for the
    image tokens in the batches of all processes.

    batches: tuples of keyword arguments of `features`, a bool mask [B, T] of the positions that predict the answer, and
    a bool mask [B, T] of image tokens. shard: this process's shard, which the batches are.
    """
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
