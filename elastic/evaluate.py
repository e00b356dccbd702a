"""What a student is worth: quality against its teacher, and the compute it spends, on data it was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elastic import families
from elastic.run import Run
from students import Student

HELD_OUT = "held-out data"
"""What a row says of a part of the training data's source that was set aside."""


def describe(run: Run, student: Student, data: str, measured: dict[str, Any]) -> dict[str, Any]:
    """A row of results: what was run, on what it was measured, what it costs, how good it is."""
    config = run.config
    trainable = sum(p.numel() for p in student.added_parameters().values())
    frozen = sum(p.numel() for p in student.model.parameters()) - trainable
    return {
        "model": config.model,
        "family": config.family,
        "preset": config.preset,
        "phase": config.budget.phase,
        "compute_target": config.budget.target,
        "data": data,
        **measured,
        "trainable_parameters": trainable,
        "trainable_share": trainable / frozen,
        "checkpoint_bytes": run.routers.stat().st_size,
    }


def measure_run(
    folder: str, *, data: str | None = None, compute: float | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Load a finished run and measure it: on all of `data`, or on what its training never saw."""
    run = Run.open(folder, finished=True)
    config = run.config
    if compute is not None and not 0 < compute <= 1:
        raise ValueError(f"--compute is {compute}; it must be above 0 and at most 1")
    teacher = run.teacher()
    student = run.load_student(teacher)
    if compute is not None:
        student.set_compute(compute)
    family = families.of(config.family)
    if data is None:
        held_out, name = family.load(config, teacher).held_out, HELD_OUT
    else:
        held_out, name = family.load_all(data, config, teacher), data
    say(f"measuring on {len(held_out):,} {family.UNIT} ...")
    row = describe(run, student, name, family.evaluate(student, held_out, config))
    return row if compute is None else {**row, "compute_target": compute}
