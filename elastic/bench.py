"""What a training step costs in teacher forwards, both measured in turn in one process."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from elastic.objective import Distillation
from elastic.run import Run

Say = Callable[[str], None]


def bench_run(folder: str, *, repeats: int = 7, say: Say = print) -> dict[str, Any]:
    """One row for the training step of a finished run, at its own batch and window.

    The ideal is 1 + 2 c teacher forwards: the teacher's forward, and the student's forward and backward at compute c of
    the phase that a step runs in (prefill); frozen weights need no gradients of their own. Times are medians in
    seconds; memory is the process's peak, in bytes, next to that of the weights alone.
    """
    run = Run.open(folder)
    config, teacher = run.config, run.teacher()
    student = run.load_student(teacher)
    module = Distillation(student, config.loss, config.budget, config.data).train()
    train = config.train
    ids = torch.randint(teacher.model.config.vocab_size, (train.batch, train.window))
    ids = ids.to(next(student.parameters()).device)

    spent: list[torch.Tensor] = []

    def forward() -> None:
        with torch.no_grad(), student.teacher():
            student(ids)

    def step() -> None:
        loss, measured = module(ids, 1.0)
        loss.backward()
        student.zero_grad()
        spent.append(measured.macs["prefill"] / measured.dense["prefill"])

    say(f"timing {repeats} teacher forwards and training steps in turn ...")
    seconds: dict[str, list[float]] = {"forward": [], "step": []}
    for turn in range(repeats + 1):
        for name, work in (("forward", forward), ("step", step)):
            started = time.perf_counter()
            work()
            if ids.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    weights = sum(p.numel() * p.element_size() for p in student.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    compute = float(spent[-1])
    ideal = 1 + 2 * compute
    return {
        "phase": "train",
        "batch": train.batch,
        "tokens": train.window,
        "compute": compute,
        "teacher_forward_seconds": medians["forward"],
        "step_seconds": medians["step"],
        "teacher_forwards": medians["step"] / medians["forward"],
        "ideal_teacher_forwards": ideal,
        "times_ideal": medians["step"] / medians["forward"] / ideal,
        "weight_bytes": weights,
        "peak_bytes": torch.cuda.max_memory_allocated() if ids.is_cuda else peak,
        "threads": torch.get_num_threads(),
        "dtype": str(teacher.model.dtype).removeprefix("torch."),
    }
