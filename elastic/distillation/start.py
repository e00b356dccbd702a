"""Steps before and after training: making a student, its closed-form calibration, and setting its dial."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from elastic import families, launch
from elastic.config import RunConfig
from elastic.distillation.dial import capacity_for, lowest, set_dial, set_range
from elastic.evaluation.session import Session
from elastic.reporting.progress import Say
from elastic.run import make_student
from elastic.traits import TRAITS
from students import Student
from students.calibration.price import Start
from teachers import Teacher

T = TypeVar("T")

DIGITS = 6
"""Decimals to which the lowest compute is known: it is computed in float32."""
LOOKED_AT = 4
"""Number of windows, images or questions on which the lowest compute is measured; few suffice, because with all gates
closed compute does not depend on the sample."""


@functools.lru_cache(maxsize=4)
def order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the numbers 0 ... count - 1 in a random order that depends on the seed and the epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def untrained(config: RunConfig, teacher: Teacher) -> Student:
    """Return an untrained student of the teacher; ValueError if its routers cannot reach the budget, where that is
    known without data: in decoding, if no tokens are exempt."""
    torch.manual_seed(config.train.seed)
    student = make_student(teacher, config)
    if config.budget.phase == "decode" and not any(router.prefix for router in student.spec.routers):
        _refuse_less(student.uniform(0.0, config.data.window, "decode"), student, config)
    return student


def require_reachable(student: Student, data: Any, config: RunConfig) -> None:
    """Raise ValueError if an untrained student's routers cannot reach the budget, as measured on a few samples."""
    shuffled = order(len(data.train), config.train.seed, 1)
    meter = families.of(config.family).compute_meter(student, data, shuffled[:LOOKED_AT], config)
    _refuse_less(lowest(student, meter, trained=False), student, config)


def _refuse_less(least: float, student: Student, config: RunConfig) -> None:
    """Raise ValueError if the budget is below the least that the student spends."""
    least = round(least, DIGITS)
    if config.budget.span[0] >= least:
        return
    decodes = TRAITS[config.family].decodes
    phase = f"{config.budget.phase} " if decodes else ""
    left = f"{math.ceil(1000 * least) / 1000:.3f} of the {phase}compute is left"
    where = "in this phase" if decodes else "in this model"
    what = "ask for more, or route more" if least < 1 else f"{where} they save nothing, so route otherwise"
    if student.record.mixes and not student.spec.find("mixture"):
        what = "ask for more, or route experts (--preset default)"
    if config.quantization != "none":
        what += "; quantized layers run whole, so that tokens and layers alone can be left out"
    raise ValueError(
        f"--target-compute {config.budget.target} is below what these routers can save: with every gate closed "
        f"{left}; {what}"
    )


def set_capacity(student: Student, data: Any, config: RunConfig) -> None:
    """If the configuration fixes the share of open gates, set it to the share that meets the budget."""
    budget = config.budget
    if budget.control == "capacity":
        tokens = families.of(config.family).tokens(student, data, config)
        student.runtime.capacity = capacity_for(student, tokens, budget.span[0], budget.phase)


def calibrate(student: Student, data: Any, config: RunConfig, say: Say, session: Session) -> Start:
    """Calibrate all routers in closed form, without training, and report the result to the user; session: holds
    calibration statistics for reuse between runs."""
    say("calibrating: what would closing each gate cost ...")
    shuffled = order(len(data.train), config.train.seed, 0)
    start = families.of(config.family).start(student, data, shuffled, config, session, say)
    say(f"closed-form start: compute {start.compute:.3f} at a price of {start.price:.2f} nats")
    return start


def adopted(student: Student, work: Callable[[], T]) -> T:
    """Run `work`, which changes a student, in all processes together, and copy the first process's result and student
    state to the others, so that all are equal bit for bit."""
    made = launch.in_step(work)
    if launch.size() == 1:
        return made

    def done() -> tuple[T, dict[str, Tensor], dict[str, Any]]:
        return made, {name: tensor.cpu() for name, tensor in student.added_state().items()}, student.setting

    made, tensors, student.setting = launch.on_main(done)
    student.load_added_state(tensors)
    return made


def set_budget(student: Student, data: Any, config: RunConfig, offsets: Sequence[float], say: Say) -> None:
    """Set the dial to the budget, or to the lowest budget of a range; offsets: first offsets to measure for a range."""
    say("setting the dial ...")
    shuffled = order(len(data.train), config.train.seed, 1)
    student.runtime.offset = 0.0
    meter = families.of(config.family).compute_meter(student, data, shuffled, config)
    if config.budget.ranges:
        set_range(student, config.budget.span, offsets, meter, say)
    else:
        set_dial(student, config.budget.span[0], meter, say)
