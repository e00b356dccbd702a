"""Evaluation of students: quality against the teacher and compute spent, on data that was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from elastic import families, launch
from elastic.evaluation.rows import HELD_OUT as HELD_OUT
from elastic.evaluation.rows import settings_of
from elastic.evaluation.session import Session
from elastic.evaluation.teacher import TeacherOutputs
from elastic.reporting.progress import Say
from elastic.run import Run
from elastic.sources import require_data
from students import Student
from teachers.wording import number_of

TOLERANCE = 0.015
"""Largest difference between the budget and the compute on held-out data at which the budget counts as met."""


def measure(
    run: Run,
    student: Student,
    name: str,
    held_out: Any,
    budgets: Sequence[float | None],
    kept: TeacherOutputs | None = None,
    part: str = "held-out",
    say: Say = print,
) -> list[dict[str, Any]]:
    """Return a row of results for each budget (None: the dial stays), measured by all processes: the run's settings,
    what was measured, and sizes.

    name, part: what rows call the data, and the part of it. kept: the teacher's outputs on this process's part of it.
    """
    kept = kept or TeacherOutputs()
    config, rows = run.config, []
    family = families.of(config.family)
    trainable = sum(p.numel() for p in student.added_parameters().values())
    frozen = sum(p.numel() for p in student.model.parameters()) - trainable
    for number, budget in enumerate(budgets, 1):
        if budget is not None:
            student.set_compute(budget)
        whole = part == "all"
        size = "all " * whole + number_of(len(held_out), family.UNIT if whole else f"{part} {family.UNIT}")
        turn = f" at compute {budget:g}, {number} of {len(budgets)}" if len(budgets) > 1 else ""
        say(f"measuring on {size}{turn} ...")
        measured = launch.in_step(partial(family.evaluate, student, held_out, config, kept))
        rows.append(
            {
                **settings_of(config, budget),
                "data": name,
                "part": part,
                **measured,
                "trainable_parameters": trainable,
                "trainable_share": trainable / frozen,
                "checkpoint_bytes": run.routers.stat().st_size,
            }
        )
    return rows


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a message for each student's row whose compute on held-out data misses the budget by over TOLERANCE."""
    lines = []
    for row in rows:
        asked, spent = row["compute_target"], row.get(f"compute_{row['phase']}", row["compute"])
        if row["data"] != HELD_OUT or row.get("baseline") is not None or abs(spent - asked) <= TOLERANCE:
            continue
        phase = f"{row['phase']} " if "compute_prefill" in row else ""
        lines.append(
            f"budget missed: {asked:.3f} was asked for, and {spent:.3f} of the {phase}compute is spent on "
            f"{HELD_OUT}; the run is finished all the same. Ask for a budget that these routers can take up, train for "
            "more steps, or measure on more (data.held_out)"
        )
    return lines


def measure_run(
    folder: str,
    *,
    data: str | None = None,
    compute: Sequence[float] = (),
    baselines: Sequence[str] = (),
    session: Session | None = None,
    failed: Callable[[str, ValueError], None] | None = None,
    say: Say = print,
) -> list[dict[str, Any]]:
    """Load a finished run and measure it on the held-out part of `data`, on all of it if it has none, or on the run's
    held-out data if that is None.

    Returns one row for each budget in `compute` (none given: one row where training left the dial, or for a range one
    at each end and one in the middle), then one for each baseline (BASELINES of the family) at the first row's compute.
    session: teacher, data, teacher outputs and calibration statistics to reuse. failed: told of a baseline that this
    student cannot have, which then has no row; None: ValueError.
    """
    session = session or Session()
    run, budgets = launch.together(partial(_what_to_measure, folder, data, compute, baselines))
    config, family = run.config, families.of(run.config.family)
    launch.main_process_first(lambda: run.teacher(session.loaded))
    student = launch.together(lambda: session.student(run))
    for budget in compute:
        launch.in_step(partial(student.set_compute, budget))  # raises for an unreachable budget before the data is read
    if data is None:
        held_out, whole = launch.main_process_first(lambda: families.load_once(config, session)).held_out, False
    else:
        held_out, whole = launch.main_process_first(lambda: families.load_all_once(data, config, session))
    part = "all" if whole else "held-out"
    rows = measure(run, student, data or HELD_OUT, held_out, budgets, session.kept(held_out), part, say)
    row = rows[0]
    for other in baselines:
        say(f"measuring the baseline {other} ...")
        spent = row.get(f"compute_{config.budget.phase}", row["compute"])  # in the phase that the target limits
        try:
            measured = launch.in_step(partial(family.baseline, other, student, held_out, config, spent, session))
        except ValueError as error:
            if failed is None:
                raise
            failed(other, error)
            continue
        nothing = {"trainable_parameters": 0, "trainable_share": 0.0, "checkpoint_bytes": 0}
        rows.append({**row, **measured, **nothing, "preset": other})
    return rows


def _what_to_measure(
    folder: str, data: str | None, compute: Sequence[float], baselines: Sequence[str]
) -> tuple[Run, tuple[float | None, ...]]:
    """Return the run and the budgets to measure it at (None: the dial stays); raise ValueError if an option does not
    fit the run."""
    run = Run.open(folder, finished=True)
    config = run.config
    if data is not None:
        require_data(data, config.family)
    for budget in compute:
        if not 0 < budget <= 1:
            raise ValueError(f"--compute is {budget}; it must be above 0 and at most 1")
    known = families.of(config.family).baselines_of(config)
    for other in baselines:
        if other not in known:
            raise ValueError(
                f"there is no baseline {other} for {config.model} and these routers, only {', '.join(known) or 'none'}"
            )
    budgets = tuple(compute) or config.budget.measured
    if baselines and len(budgets) > 1:
        given = f"{len(budgets)} are given" if compute else f"{folder} serves {config.budget.target}"
        raise ValueError(f"--baselines need one compute, and {given}: say --compute 0.7")
    return run, budgets


def compare_runs(folder: str, other: str, *, data: str | None = None) -> list[dict[str, Any]]:
    """Return, for two runs of one image model, a row for each router with the rank correlation of its scores in both
    runs, and a last row "mean". Raises ValueError for other families and for runs of different weights."""
    runs = [Run.open(path, finished=True) for path in (folder, other)]
    config = runs[0].config
    if data is not None:
        require_data(data, config.family)
    family = families.of(config.family)
    if family.score_correlations is None:
        raise ValueError(f"comparing is for image models; {config.model} is none")
    if runs[0].about["identity"] != runs[1].about["identity"]:
        raise ValueError(f"{folder} and {other} are runs of different models: {config.model}, {runs[1].config.model}")
    loaded = [run.teacher() for run in runs]
    students = [run.load_student(teacher, prepare=False) for run, teacher in zip(runs, loaded, strict=True)]
    if data is None:
        images = family.load(config, loaded[0]).held_out
    else:
        images, _ = family.load_all(data, config, loaded[0])
    found = family.score_correlations(*students, images)
    found["mean"] = sum(found.values()) / len(found)
    return [{"router": key, "correlation": value} for key, value in found.items()]
