"""`elastic bench --random-weights`: time a model of a given shape, with random weights and data, on this machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from elastic import families
from elastic.accounting.memory import free_memory, need_of
from elastic.bench import measure, workload_of
from elastic.config import RunConfig
from elastic.distillation.start import calibrate, require_reachable, set_budget, set_capacity, untrained
from elastic.evaluation.session import Session
from elastic.reporting.progress import Say
from elastic.run import DTYPES, share_weights
from elastic.timing.workload import Workload
from students.kernels.capture import KEPT
from teachers import Teacher
from teachers.load import preferred_dtype
from teachers.quantize import quantize
from teachers.shapes import Shape, build, find_shape


def bench_shape(config: RunConfig, *, say: Say = print, **asked: Any) -> list[dict[str, Any]]:
    """Time a model with random weights, calibrated on random data to the budget; return rows like those of `bench_run`.

    config: from `shape_config`. asked: options of `workload_of`. If two copies of the weights do not fit into the free
    memory, the dense model shares the student's; if a training step does not fit, it is not timed. Raises ValueError if
    not even one copy fits.
    """
    workload = workload_of(config, **asked)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[config.train.precision] or preferred_dtype(device)
    shape = find_shape(config.model)
    copies, trains = _fits(shape, config, workload, dtype, device, say)

    def build_model() -> nn.Module:
        torch.manual_seed(config.train.seed)
        model = build(shape, dtype, device)
        if config.quantization != "none":
            quantize(model, config.quantization, device)
        return model

    model = build_model()
    shared = None if copies == 2 else share_weights(model)
    family = families.of(config.family)
    data = family.random_data(replace(config, data=replace(config.data, held_out=workload.samples)), model)
    say(f"{shape.name}: {sum(p.numel() for p in model.parameters()):,} random weights; {data.description}")
    student = untrained(config, Teacher(shape.name, model, None, shape.family, "random weights", ""))
    require_reachable(student, data, config)
    set_capacity(student, data, config)
    offsets = calibrate(student, data, config, say, Session()).offsets if config.calibration.windows else [0.0]
    set_budget(student, data, config, offsets, say)
    return measure(
        student, (lambda: shared) if shared is not None else build_model, data, config, workload, trains, say
    )


def _fits(
    shape: Shape, config: RunConfig, workload: Workload, dtype: torch.dtype, device: torch.device, say: Say
) -> tuple[int, bool]:
    """Return how many copies of the weights fit into memory, 1 or 2, and whether a training step fits too.

    Raises ValueError if not even one copy fits.
    """
    model = build(shape, dtype, "meta")
    sizes = families.of(config.family).timing.input_sizes(model, config, workload)
    need, free = need_of(model, sizes.trunk), free_memory(device)
    held = sum(sorted(workload.batch)[-KEPT:]) * sizes.recorded
    work = need.inference(max(workload.batch) * sizes.longest) + need.recorded(held)
    work = max(work, need.calibration(sizes.calibrated, sizes.sampled))
    step = need.backward(config.train.batch * sizes.trained)
    if need.copies(1) + work > free:
        raise ValueError(
            f"{shape.name} needs about {(need.copies(1) + work) / 1e9:.1f} GB, {need.copies(1) / 1e9:.1f} of them for "
            f"weights in {str(dtype).removeprefix('torch.')}, and {free / 1e9:.1f} GB are free on this {device.type}: "
            "take a smaller shape, or smaller --batch, --tokens and --set calibration.windows"
        )
    copies = 2 if need.copies(2) + work <= free else 1
    trains = need.copies(1) + step <= free
    if copies == 1:
        say("the dense model shares the student's weights: a second copy does not fit into the free memory")
    if not trains:
        say(f"no training step: one of {config.train.batch} does not fit into the free memory (--set train.batch=1)")
    return copies, trains
