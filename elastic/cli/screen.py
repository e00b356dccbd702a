"""Messages, progress bars and tables of results on the terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from elastic import launch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from elastic.reporting.progress import Say

QUIET_SECONDS = 20
"""Interval in seconds at which a long loop reports its progress if stderr is no terminal and shows no bar."""


@contextmanager
def screen() -> Iterator[tuple[Say, Callable[..., None]]]:
    """Context that gives the functions (say, progress), which print lines and draw a bar on stderr, so that stdout has
    results only. Of several processes only the first prints."""
    if not launch.is_main():
        yield lambda _: None, lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from elastic.reporting.progress import watched_by

    # opened before sys.stderr is replaced to silence lm-evaluation-harness, so that it still prints then
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True, markup=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=None, visible=False)
        loop = bar.add_task("", total=None, visible=False)
        times = [0.0, time.monotonic()]  # when the loop began and when a loop last reported progress

        def progress(step: int, steps: int | None, line: dict[str, float]) -> None:
            phases = [key.removeprefix("compute_") for key in line if key.startswith("compute_")]
            spent = ", ".join(f"{line[f'compute_{p}']:.3f}" + f" {p}" * (len(phases) > 1) for p in phases)
            bar.update(task, completed=step, total=steps, visible=steps is None or step < steps)
            if not console.is_terminal or step % 50 == 0 or step == steps:
                left = "" if steps is None else f", {(steps - step) / line['steps_per_second'] / 60:.1f} min left"
                console.print(f"step {step}/{steps or '?'}: KL {line['kl']:.4f}, compute {spent}{left}")

        def watch(what: str, done: int, total: int) -> None:
            now = time.monotonic()
            bar.update(loop, description=what, completed=done, visible=done < total)
            if done == 0:
                bar.reset(loop, total=total)
                times[0] = now
            elif not console.is_terminal and done < total and now - times[1] > QUIET_SECONDS:
                times[1] = now
                left = (now - times[0]) / done * (total - done) / 60
                console.print(f"{what}: {done} of {total} done, {left:.1f} min left")

        with watched_by(watch), _log_to(console.print):
            yield console.print, progress


@contextmanager
def _log_to(say: Say) -> Iterator[None]:
    """Context in which log messages of our packages go to `say`, so that they do not break the bar."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    loggers, handler = [logging.getLogger(name) for name in ("elastic", "teachers")], Handler()
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def print_rows(rows: list[dict[str, Any]], file: Path | None = None) -> None:
    """Print the table of results at the end of a run: a line for each quantity or, of several rows of results, what all
    have in common, then a line for each row.

    Raises ValueError if the rows were read from `file`, and lack a quantity or have another kind of value there.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    from elastic import families
    from teachers.quiet import one_line

    with one_line(f"{file} is damaged: its results cannot be shown") if file else nullcontext():
        lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
            ("model", lambda r: str(r["model"])),
            ("preset", lambda r: str(r["preset"])),
            *families.of(rows[0]["family"]).lines(),
            ("trainable parameters", lambda r: f"{r['trainable_parameters']:,} ({r['trainable_share']:.3%})"),
            ("checkpoint", lambda r: f"{r['checkpoint_bytes'] / 1e6:.2f} MB"),
        ]
        found = {name: [show(row) for row in rows] for name, show in lines}
    common = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False)  # shown whole, however narrow
    for name, values in found.items():
        if len(set(values)) == 1:
            common.add_row(name, values[0])
    console = Console(soft_wrap=True, markup=False)
    console.print(common)
    if len(rows) > 1:
        apart = {name: values for name, values in found.items() if len(set(values)) > 1}
        table = Table(*(Column(name, no_wrap=True) for name in apart), box=SIMPLE)
        for row in zip(*apart.values(), strict=True):
            table.add_row(*row)
        Console(width=200, markup=False).print(table)  # wide, so that no number is cut in a narrow terminal or a pipe
