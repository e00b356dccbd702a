"""Estimate what distilling a model of a given shape takes: memory of each GPU, FLOPs of a step, days of training.

Every process holds all frozen weights in bfloat16, shared by teacher and student, or if they are spread its part of
them and the two units that are whole at a time (elastic/sharding.py). Routers are float32, with a gradient and Adam's
two moments. A training step takes three forward passes: the teacher's, the student's, which also computes what closed
gates mask, and the student's backward pass, with as many products as a forward pass, since frozen weights need no
gradients. A vision tower without trained parameters takes only the first two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from elastic import families
from elastic.accounting.memory import SLACK, kept_bytes, need_of
from elastic.bench import workload_of
from elastic.config import RunConfig
from elastic.sharding import units
from elastic.timing.workload import StepSizes
from elastic.traits import TRAITS
from losses import default_chunk_rows
from students import Student, elasticize
from teachers.shapes import build, find_shape

FORWARDS = 3
"""Forward passes that a training step costs; one more if blocks are recomputed (train.checkpointing)."""
AMOUNTS = {"tokens": 1e8, "samples": 1e6}
"""Default amount of training data: tokens of text, or samples (images or questions)."""


def step_flops(student: Student, rows: int, sizes: StepSizes) -> float:
    """Return the FLOPs of a training step on `rows` samples of these sizes."""
    return 2 * rows * ((FORWARDS + student.runtime.recompute) * sizes.macs + 2 * sizes.frozen)


def step_bytes(student: Any, rows: int, sizes: StepSizes) -> int:
    """Return the peak memory of a training step on `rows` samples in bytes, without weights and routers: activations
    kept for backward, and the larger of what a block adds in backward and the logits of a chunk of rows."""
    kept, passing = (rows * sizes.tokens * part for part in kept_bytes(student))
    if sizes.images:
        kept += rows * sizes.images * kept_bytes(student.vision)[0]
    if sizes.logits:
        frozen = next(p for p in student.model.parameters() if not p.requires_grad)
        vocabulary = student.model.config.get_text_config().vocab_size
        device = torch.device("cuda") if frozen.is_meta else frozen.device
        chunk = min(rows * sizes.logits, default_chunk_rows(vocabulary, frozen.dtype, device))
        # exact logits, previews and the teacher's logits; the gradients of the first two overwrite them
        passing = max(passing, chunk * vocabulary * frozen.element_size() * 3)
    return round(SLACK * (kept + passing))


def router_bytes(student: Student) -> int:
    """Return the bytes of routers and other added tensors, their gradients and the optimizer's moments."""
    learned = sum(p.nbytes for p in student.added_parameters().values())
    return 3 * learned + sum(x.nbytes for x in student.added_tensors().values())


def plan(
    config: RunConfig, *, gpus: int, memory: float, amount: dict[str, float], peak: float, share: float
) -> dict[str, Any]:
    """Return the estimate for a model's shape (configuration from `plan_config`) on a number of GPUs.

    memory: GB of each GPU. amount: "tokens" of text or else "samples" to train on (empty: AMOUNTS). peak: TFLOP/s of
    each GPU. share: share of this peak that is reached. Raises ValueError for options that do not apply.

    Keys of the result, in bytes of one GPU: weights, routers, activations (peak of a step), calibration, needed, free;
    fits, whether these fit; spread, a dictionary with weights, needed, free and fits if the weights are spread over all
    GPUs. Further keys: batch and rows, samples of a micro-batch in all and on one GPU; unit, what a sample is called;
    length, its tokens; flops_per_token, step_flops, step_seconds, tokens, samples, steps, days.
    """
    family, train = families.of(config.family), config.train
    counted, wanted = _amount(config, amount)
    for name, given in {"gpus": gpus, "memory": memory, counted: wanted, "peak": peak}.items():
        if not 0 < given < math.inf:
            raise ValueError(f"--{name} is {given:g}; it must be above 0")
    if not 0 < share <= 1:
        raise ValueError(f"--share is {share:g}; it must be above 0 and at most 1 (0.4 means 40 %)")
    model: Any = build(find_shape(config.model), torch.bfloat16, "meta")
    read = family.timing.input_sizes(model, config, workload_of(config))
    need = need_of(model, read.trunk)
    whole = sum(sorted(_bytes(unit) for unit in units(model))[-2:])
    student = elasticize(model, config.student)
    if train.checkpointing:
        student.checkpoint_blocks()
    sizes = family.timing.step_sizes(student, config)
    batch = max(train.batch, gpus)
    rows = -(-batch // gpus)
    spent = {
        "weights": need.weights,
        "routers": router_bytes(student),
        "activations": step_bytes(student, rows, sizes),
        "calibration": need.calibration(read.calibrated, -(-read.sampled // gpus)),
    }
    besides = spent["routers"] + max(spent["activations"], spent["calibration"])

    def room(weights: int) -> dict[str, Any]:
        free = round(memory * 1e9) - weights - besides
        return {"weights": weights, "needed": weights + besides, "free": free, "fits": free >= 0}

    each = step_flops(student, 1, sizes)
    step = train.accumulation * batch * each
    seconds = step / (gpus * peak * 1e12 * share)
    samples = wanted / sizes.tokens if counted == "tokens" else wanted
    steps = math.ceil(samples / (train.accumulation * batch))
    return {
        "model": config.model,
        "preset": config.preset,
        "gpus": gpus,
        "parameters": need.weights // 2,
        "trainable_parameters": sum(p.numel() for p in student.added_parameters().values()),
        **spent,
        **room(need.weights),
        "spread": room(-(-need.weights // gpus) + whole),
        "batch": batch,
        "rows": rows,
        "unit": family.UNIT,
        "length": sizes.tokens,
        "flops_per_token": each / sizes.tokens,
        "step_flops": step,
        "step_seconds": seconds,
        "tokens": samples * sizes.tokens,
        "samples": samples,
        "steps": steps,
        "days": steps * seconds / 86400,
    }


def _amount(config: RunConfig, amount: dict[str, float]) -> tuple[str, float]:
    """Return what the model's data is counted in, "tokens" or "samples", and how many are trained on."""
    family = families.of(config.family)
    counted, other = ("tokens", "samples") if "tokens" in family.timing.OPTIONS else ("samples", "tokens")
    if other in amount:
        raise ValueError(
            f"{config.model} is {TRAITS[config.family].noun}, which trains on {family.UNIT}: "
            f"say --{counted} instead of --{other}"
        )
    if config.quantization != "none":
        raise ValueError(f"plan counts weights in bfloat16: leave quantization={config.quantization} away")
    return counted, amount.get(counted, AMOUNTS[counted])


def _bytes(modules: list[nn.Module]) -> int:
    return sum(p.nbytes for module in modules for p in module.parameters())
