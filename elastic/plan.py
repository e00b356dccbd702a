"""What distilling a model of some shape would take, on paper: memory of a GPU, FLOPs of a step, days.

Every process has all of the frozen weights in bfloat16, which are teacher and student at once, or its part of them and
what is whole at a time, two units of them (elastic/sharding.py); routers are float32, with a gradient and Adam's two
moments. A training step is a forward pass of the teacher, one of the student, which computes what its gates close as
well, and the student's way back, whose products are as many as those of a forward pass, since frozen weights need no
gradients: 3 forward passes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from elastic.accounting.memory import SLACK, kept_bytes, need_of
from elastic.config import RunConfig, make_config
from elastic.sharding import units
from elastic.traits import TRAITS
from losses import default_chunk_rows
from students import Student, elasticize
from students.calibration.language import ROWS_PER_BATCH
from students.compute import Phase
from teachers.registry import ModelEntry
from teachers.shapes import build, find_shape

FORWARDS = 3
"""Forward passes that a training step costs; one more where blocks are computed again (train.checkpointing)."""
PHASE: Phase = "prefill"
"""What a training step computes: whole windows."""


def step_flops(student: Student, rows: int, window: int) -> float:
    """FLOPs of a training step with so many windows."""
    valid = torch.ones(1, window, dtype=torch.bool)
    return (FORWARDS + student.recompute) * 2 * rows * float(student.compute.dense(valid, PHASE).double().sum())


def step_bytes(student: Student, rows: int, window: int) -> int:
    """What a training step needs at its peak besides the weights: what backward reads, and logits of a few rows."""
    model: Any = student.model
    head, frozen = model.get_output_embeddings(), next(p for p in model.parameters() if not p.requires_grad)
    size, vocabulary = frozen.element_size(), model.config.get_text_config().vocab_size
    device = torch.device("cuda") if frozen.is_meta else frozen.device
    chunk = min(rows * window, default_chunk_rows(vocabulary, frozen.dtype, device)) if head is not None else 0
    # exact ones, previews, the two together, the teacher's, and gradients: of all, of exact ones, of previews
    logits = chunk * vocabulary * size * 7
    kept, passing = kept_bytes(student)
    return round(SLACK * (rows * window * kept + max(rows * window * passing, logits)))


def router_bytes(student: Student) -> int:
    """Routers, their gradients and the optimizer's moments."""
    learned = sum(p.numel() * p.element_size() for p in student.added_parameters().values())
    return 3 * learned + sum(x.numel() * x.element_size() for x in student.added_tensors().values())


def plan_config(name: str, *, settings: list[str] | None = None, **flags: Any) -> RunConfig:
    """The configuration of a run of a model of this shape; the rest as `make_config` has it."""
    entry = ModelEntry(name, family=find_shape(name).family, data="any")
    return make_config(entry=entry, settings=settings, model=name, **flags)


def plan(config: RunConfig, *, gpus: int, memory: float, tokens: float, peak: float, share: float) -> dict[str, Any]:
    """The estimate for a language model's shape (see `plan_config`), on so many GPUs.

    memory: GB of one; tokens: how many to train on; peak: TFLOP/s of one, of which a share is reached. Keys in bytes,
    of one GPU: weights, routers, activations (at the peak of a step), calibration, needed, free. fits; spread, the same
    of weights, needed, free and fits where the weights are spread over all GPUs; batch and rows, a step's windows in
    all and on one GPU; flops_per_token, step_flops, step_seconds, steps and days.
    """
    if not TRAITS[config.family].tasks:
        raise ValueError(f"{config.model} is {TRAITS[config.family].noun}; plan knows language models alone")
    if config.quantization != "none":
        raise ValueError(f"plan counts weights in bfloat16: leave quantization={config.quantization} away")
    if min(gpus, memory, tokens, peak) <= 0 or not 0 < share <= 1:
        raise ValueError("--gpus, --memory, --tokens and --peak must be above 0, and --share above 0 and at most 1")
    shape, train = find_shape(config.model), config.train
    model = build(shape, torch.bfloat16, "meta")
    need = need_of(model, model)
    windows = config.calibration.windows  # two of them at a time
    batches = -(-windows // 2)
    weights = need.weights
    whole = sorted(sum(p.numel() * p.element_size() for m in unit for p in m.parameters()) for unit in units(model))[
        -2:
    ]
    student = elasticize(model, config.student)
    if train.checkpointing:
        student.checkpoint_blocks()
    batch = max(train.batch, gpus)
    rows = -(-batch // gpus)
    spent = {
        "weights": weights,
        "routers": router_bytes(student),
        "activations": step_bytes(student, rows, train.window),
        "calibration": need.calibration(min(2, windows) * config.data.window, -(-batches // gpus) * ROWS_PER_BATCH),
    }
    besides = spent["routers"] + max(spent["activations"], spent["calibration"])

    def room(weights: int) -> dict[str, Any]:
        free = round(memory * 1e9) - weights - besides
        return {"weights": weights, "needed": weights + besides, "free": free, "fits": free >= 0}

    each = step_flops(student, 1, train.window)
    step = train.accumulation * batch * each
    seconds = step / (gpus * peak * 1e12 * share)
    steps = math.ceil(tokens / (train.accumulation * batch * train.window))
    return {
        "model": config.model,
        "preset": config.preset,
        "gpus": gpus,
        "parameters": weights // 2,
        "trainable_parameters": sum(p.numel() for p in student.added_parameters().values()),
        **spent,
        **room(weights),
        "spread": room(-(-weights // gpus) + sum(whole)),
        "batch": batch,
        "rows": rows,
        "window": train.window,
        "flops_per_token": each / train.window,
        "step_flops": step,
        "step_seconds": seconds,
        "tokens": tokens,
        "steps": steps,
        "days": steps * seconds / 86400,
    }
