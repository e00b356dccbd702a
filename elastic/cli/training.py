"""Commands that train: distill, sweep, pretrain."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic import launch
from elastic.cli.screen import print_rows, screen
from elastic.files import require_place, require_run

if TYPE_CHECKING:
    from elastic.config import RunConfig

MISSED = 3
"""Exit code if a run or sweep has finished but misses a budget."""


def distill_command(options: argparse.Namespace) -> int | None:
    """`elastic distill`: train a new run or resume one; return the exit code."""
    asked = launch.main_process_first(functools.partial(_what_to_distil, options))
    from elastic import trainer
    from elastic.run import Run

    with screen() as (say, progress):
        common: dict[str, Any] = {"teacher_cache": options.teacher_cache, "say": say, "progress": progress}
        if asked is None:
            trainer.resume(options.resume, **common)
        else:
            trainer.distill(*asked, overwrite=options.overwrite, **common)
    if not launch.is_main():
        return None
    folder = options.resume if asked is None else asked[1]
    run = Run.open(folder)
    rows = run.about["results"]
    print_rows(rows, run.folder / "elastic.json")
    print(f"student: {folder}   measure it elsewhere: elastic eval {shlex.quote(folder)} --data FILE")
    return _report_missed(rows)


def _what_to_distil(options: argparse.Namespace) -> tuple[RunConfig, str] | None:
    """Return the configuration and the run folder, or None if a run is resumed with its own.

    Raises ValueError if options contradict each other.
    """
    if options.resume:
        names = ("model", "target_compute", "preset", "data", "output", "steps", "minutes", "config", "set")
        given = [name for name in names if getattr(options, name) is not None] + ["overwrite"] * options.overwrite
        if given:
            extra = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"--resume continues with the run's own configuration: leave {extra} away")
        require_run(options.resume)
        return None
    from elastic.config import make_config

    config = make_config(
        file=options.config,
        settings=options.set,
        model=options.model,
        preset=options.preset,
        budget__target=options.target_compute,
        data__source=options.data,
        train__steps=options.steps,
        train__minutes=options.minutes,
    )
    name = os.path.basename(os.path.normpath(config.model))
    return config, options.output or f"runs/{name}-{'-'.join(f'{end:g}' for end in sorted(set(config.budget.span)))}"


def sweep_command(options: argparse.Namespace) -> int | None:
    """`elastic sweep`: finish all points of a sweep and print their table; return the exit code."""
    from elastic.sweep_tasks import plan

    flags = {"data__source": options.data, "train__steps": options.steps, "train__minutes": options.minutes}
    runs: dict[str, Any] = {
        "models": options.model,
        "budgets": options.target_compute,
        "presets": options.preset,
        "seeds": options.seed,
        "per_budget": options.per_budget,
        "settings": options.set,
    }
    # finds mistakes before libraries are imported
    launch.main_process_first(functools.partial(plan, **runs, flags=flags))
    from elastic.sweep import sweep

    with screen() as (say, progress):
        rows = sweep(
            options.output,
            **runs,
            **flags,
            baselines=options.baselines,
            eval_data=options.eval_data,
            timed=not options.no_bench,
            teacher_cache=options.teacher_cache,
            command=shlex.join(options.line),
            say=say,
            progress=progress,
        )
    if not launch.is_main():
        return None
    from rich.console import Console
    from rich.table import Table

    from teachers.wording import number_of

    keys = list(dict.fromkeys(key for row in rows for key, _, _ in row["metrics"]))
    names = [key for key in ("model", "preset", "seed") if len({row[key] for row in rows}) > 1]  # only what varies
    table = Table(*names, "student", "asked", "compute", *(key.replace("_", " ") for key in keys))
    for row in rows:
        which = (*(str(row[key]) for key in names), row["baseline"] or "trained")
        numbers = (f"{row['compute_target']:.3f}", f"{row['compute']:.3f}")
        table.add_row(*which, *numbers, *(f"{row[k]:.4f}" if k in row else "" for k in keys))
    Console(width=160).print(table)
    page = f"elastic report {shlex.quote(options.output)} -o report.html"
    print(f"{number_of(len(rows), 'points')}: {options.output}   a page about them: {page}")
    return _report_missed(rows)


def _report_missed(rows: Sequence[dict[str, Any]]) -> int | None:
    """Print a line for each missed budget, and return the exit code: MISSED, or None if all are met."""
    from elastic.evaluate import missed

    lines = missed(rows)
    for line in lines:
        print(f"elastic: {line}", file=sys.stderr)
    return MISSED if lines else None


def pretrain_command(options: argparse.Namespace) -> None:
    """`elastic pretrain`: train a small image model, or with easy-vqa a vision-language model, as a teacher."""
    from teachers.data.questions import EASY_VQA
    from teachers.recipes.image import pretrain
    from teachers.recipes.vision_language import pretrain_vlm

    if options.epochs is not None and options.epochs < 1:
        raise ValueError("--epochs must be at least 1")
    require_place(Path(options.output))
    with screen() as (say, _):
        if options.data == EASY_VQA:
            for option in ("epochs", "start"):
                if getattr(options, option) is not None:
                    raise ValueError(f"--{option} is for image models: leave it away with --data {EASY_VQA}")
            train, name = functools.partial(pretrain_vlm, options.output), "accuracy"
        else:
            epochs, start = options.epochs or 12, options.start
            train, name = functools.partial(pretrain, options.data, options.output, epochs=epochs, start=start), "top-1"
        try:
            accuracy = train(say=say)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on from here") from None
    print(f"{name} {accuracy:.2%}; use it: elastic distill --model {options.output} --data {options.data}")
