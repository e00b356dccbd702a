"""Sweeps: distil, measure and time many runs at many budgets into one folder; a kill loses at most one point."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from elastic import bench, evaluate, families, launch, sharding, trainer
from elastic.config import RunConfig
from elastic.evaluation.session import Session
from elastic.files import Unwritable, require_place, write_text
from elastic.reporting.progress import Say
from elastic.reporting.results import Key, Row, SweepFolder, key_of
from elastic.run import Run
from elastic.settings import to_dict
from elastic.sources import require_data
from elastic.surroundings import surroundings
from elastic.sweep_tasks import Task, plan


@dataclass(frozen=True)
class PointOptions:
    """Options that all points of a sweep share."""

    data: str | None
    """Data to measure on; None: each run's held-out data."""
    timed: bool
    """Whether speed is measured."""
    command: str
    """The command line that rows record as their origin."""


@contextmanager
def _says_how_to_go_on() -> Iterator[None]:
    """Context, or decorator, in which errors of the system, such as a full disk, say how to go on."""
    try:
        yield
    except OSError as error:
        error.__notes__ = ["the same command goes on from here"]
        raise


@_says_how_to_go_on()
def sweep(
    output: str | Path,
    *,
    models: Sequence[str],
    budgets: Sequence[float],
    presets: Sequence[str] = ("default",),
    seeds: Sequence[int] = (0,),
    baselines: Sequence[str] = (),
    per_budget: bool = False,
    eval_data: str | None = None,
    timed: bool = True,
    teacher_cache: str | Path | None = None,
    command: str = "",
    say: Say = print,
    progress: Callable[..., None] = lambda *_: None,
    settings: Sequence[str] = (),
    **flags: Any,
) -> list[Row]:
    """Finish every point of a sweep in the folder `output`, and return the rows of all points.

    A point is a run at one budget; it has a row for the student and one for each baseline. Rows that exist already are
    not made again. One run serves all budgets of a model, preset and seed; with per_budget each budget has its own run.

    eval_data: data to measure on; None: each run's held-out data. timed: whether speed is measured. teacher_cache: see
    `distill`. command: the command line that rows record. settings, flags: see `make_config`.

    A point that fails is reported and left out, and ValueError is raised at the end; if no row exists yet, or other
    processes do not know of the error, the error itself is raised at once. (This is one function because missing rows,
    the clock and the failures are needed at every step.)
    """
    if timed:
        sharding.refuse_timing()

    def prepare() -> list[Task]:
        tasks = plan(models, budgets, presets, seeds, per_budget, settings, flags)
        _require_baselines(baselines, tasks)
        if eval_data is not None:
            for name in {task.config.family for task in tasks}:
                require_data(eval_data, name)
        return tasks

    tasks = launch.together(prepare)
    folder = SweepFolder(output)

    def begin() -> list[Row]:
        require_place(folder.folder)
        if folder.folder.is_dir() and not folder.results.exists() and any(folder.folder.iterdir()):
            raise ValueError(f"{output} exists and is not a sweep folder: name another with --output")
        for task in tasks:
            _require_same(folder.run(task.name), task.config)
        folder.prepare()
        return folder.rows()

    options, session = PointOptions(eval_data, timed, command), Session(several=len(tasks) > 1)
    wanted = {
        (task.name, point): _keys(task, point[0], baselines, eval_data) for task in tasks for point in task.points
    }
    finished = {key_of(row): row for row in launch.on_main(begin)}

    def missing(keys: list[Key]) -> list[str | None]:
        """Return which rows of a point are missing: None for the student's (also if untimed), or a baseline's name."""
        untimed = timed and finished.get(keys[0], {}).get("bench") is None
        return [key[2] for key in keys if key not in finished or (untimed and key is keys[0])]

    todo = [(task, [point for point in task.points if missing(wanted[task.name, point])]) for task in tasks]
    todo = [(task, points) for task, points in todo if points]
    new = [task for task, _ in todo if not launch.on_main((folder.run(task.name) / "routers.safetensors").exists)]
    clock = Clock(runs=len(new), points=sum(len(points) for _, points in todo))
    if new and new[0].config.train.minutes is not None:
        clock.expect("runs", 60 * new[0].config.train.minutes)
    failures: list[str] = []

    def failed(what: str, keys: list[Key], error: Exception) -> None:
        if not finished or not launch.is_everyones(error) or isinstance(error, Unwritable):
            raise error
        reason = str(error).splitlines()[0]
        launch.on_main(partial(folder.fail, keys, reason))
        failures.append(f"{what}: {reason}")
        say(f"failed: {failures[-1]}")

    for task, points in todo:
        say(f"[{clock}] {task.name}: {', '.join(f'{budget:g}' for budget, _ in points)}")
        try:
            with clock.timing("runs", counts=task in new):
                _distil(folder.run(task.name), task.config, session, teacher_cache, say, progress)
        except (ValueError, OSError) as error:
            clock.skip("points", len(points))
            failed(task.name, [wanted[task.name, point][0] for point in points], error)
            continue
        for point in points:
            keys, name = wanted[task.name, point], f"{task.name} at {point[0]:g}"
            say(f"[{clock}] {name}")

            def without(baseline: str, error: Exception, keys: list[Key] = keys, name: str = name) -> None:
                failed(f"{name}, baseline {baseline}", [key for key in keys if key[2] == baseline], error)

            try:
                with clock.timing("points"):
                    for row in _measure(folder, task, point, missing(keys), options, session, without, say):
                        launch.on_main(partial(folder.append, row))
                        finished[key_of(row)] = row
            except (ValueError, OSError) as error:
                failed(name, keys[:1], error)
    if failures:
        raise ValueError(f"{len(failures)} failed, the rest is in {output}; the first was {failures[0]}")
    return [finished[key] for keys in wanted.values() for key in keys]


def _keys(task: Task, budget: float, baselines: Sequence[str], data: str | None) -> list[Key]:
    """Return the keys of a point's rows: the student's, then one for each baseline that the run's routers can have
    (none at 1.0, where the student is the teacher)."""
    known = families.of(task.config.family).baselines_of(task.config)
    kinds = (None, *dict.fromkeys(kind for kind in baselines if kind in known and budget < 1))
    return [(f"runs/{task.name}", budget, kind, data or evaluate.HELD_OUT) for kind in kinds]


def _require_baselines(baselines: Sequence[str], tasks: Sequence[Task]) -> None:
    """Raise ValueError for a baseline that no run of the sweep can have; runs that lack one are measured without."""
    of = [families.of(task.config.family).baselines_of(task.config) for task in tasks]
    known = list(dict.fromkeys(name for names in of for name in names))
    for name in baselines:
        if name not in known:
            raise ValueError(
                f"there is no baseline {name} for these models and routers, only {', '.join(known) or 'none'}"
            )


def _require_same(path: Path, config: RunConfig) -> None:
    """Raise ValueError if the run folder exists and was made with other settings."""
    if not _started(path):
        return
    old, new = (_flat(to_dict(c)) for c in (Run.open(path).config, config))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{path} was made with {key} {old.get(key)}, not {new.get(key)}: name another folder with --output"
            )


def _started(path: Path) -> bool:
    """Return whether the folder has a run, finished or not."""
    return (path / "config.yaml").exists() and (path / "elastic.json").exists()


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Return a nested dictionary as a flat one with dotted keys."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        key: value for name, part in tree.items() for key, value in _flat(part, f"{path}.{name}".strip(".")).items()
    }


def _distil(
    path: Path,
    config: RunConfig,
    session: Session,
    teacher_cache: str | Path | None,
    say: Say,
    progress: Callable[..., None],
) -> None:
    """Start the run, resume it if it was interrupted, or do nothing if it is finished."""
    common: dict[str, Any] = {"teacher_cache": teacher_cache, "session": session, "say": say, "progress": progress}
    try:
        begun, done = launch.on_main(lambda: (_started(path), Run(path).routers.exists()))
        if not begun:
            trainer.distill(config, path, overwrite=True, **common)
        elif not done:
            trainer.resume(path, **common)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on from here") from None


def _measure(
    folder: SweepFolder,
    task: Task,
    point: tuple[float, float | None],
    kinds: Sequence[str | None],
    options: PointOptions,
    session: Session,
    without: Callable[[str, Exception], None],
    say: Say,
) -> Iterator[Row]:
    """Measure a point and yield its missing rows, `kinds` (None: the student's, else a baseline's name).

    For the student's row, the details for reports are written too, and speed is measured if asked for. At the end
    `without` is told of each baseline that failed.
    """
    budget, turn = point
    path = str(folder.run(task.name))
    baselines = [kind for kind in kinds if kind is not None]
    turns, lost = () if turn is None else (turn,), dict[str, ValueError]()
    measured = evaluate.measure_run(
        path,
        data=options.data,
        compute=turns,
        baselines=baselines,
        session=session,
        failed=lost.__setitem__,
        say=say,
    )
    run = Run.open(path)
    metrics = families.of(task.config.family).METRICS
    for row, baseline in zip(measured, (None, *(b for b in baselines if b not in lost)), strict=True):
        if baseline not in kinds:
            continue
        row |= {
            "run": f"runs/{task.name}",
            "preset": task.config.preset,
            "baseline": baseline,
            "seed": task.config.train.seed,
            "trained_for": task.target,
            "compute_target": budget,
            "metrics": [metric for metric in metrics if metric[0] in row],
            "bench": None,
            "train_seconds": run.about.get("seconds"),
            "train_steps": run.about.get("steps", task.config.train.steps),
            "command": options.command,
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            **surroundings(),
        }
        if baseline is None:
            if turn != 1:  # at 1.0 the student is the teacher, which routes nothing
                details = launch.together(partial(routing_details, path, turn, session))
                launch.on_main(partial(_write_details, folder, row, details))
            if options.timed:
                row["bench"] = launch.on_main(partial(bench.bench_run, path, compute=turns, say=say))
        yield row
    for name, error in lost.items():
        without(name, error)


def routing_details(path: str, turn: float | None, session: Session | None = None) -> dict[str, Any]:
    """Return where a finished run spends its compute (see elastic/accounting/routing.py), at compute `turn` (None: the
    dial stays).

    Examples are always those that seed 0 holds out, so that runs with different seeds can be compared.
    """
    session, run = session or Session(), Run.open(path, finished=True)
    config, student = run.config, session.student(run)
    if turn is not None:
        student.set_compute(turn)
    sample = families.load_once(replace(config, train=replace(config.train, seed=0)), session).held_out
    return families.of(config.family).routing(student, sample, session.loaded(config), config)


def _write_details(folder: SweepFolder, row: Row, details: dict[str, Any]) -> None:
    file = folder.details(row)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(details) + "\n")


class Clock:
    """Counts finished runs and points, and estimates the time left from the mean time of each kind so far."""

    def __init__(self, runs: int, points: int) -> None:
        self.left = {"runs": runs, "points": points}
        self.points = points
        self._seconds: dict[str, list[float]] = {"runs": [], "points": []}
        self._expected: dict[str, float] = {}

    def expect(self, kind: str, seconds: float) -> None:
        """Set the time in seconds that one run or point is expected to take until one has been timed."""
        self._expected[kind] = seconds

    @contextmanager
    def timing(self, kind: str, counts: bool = True) -> Iterator[None]:
        """Context that times one run or point and counts it as done, also after an error, which leaves it untimed.

        counts: False for one that is not counted in `left`, such as a run that is finished already.
        """
        started = time.monotonic()
        try:
            yield
            if counts:
                self._seconds[kind].append(time.monotonic() - started)
        finally:
            self.left[kind] -= counts

    def skip(self, kind: str, count: int) -> None:
        """Remove `count` runs or points that will not be done from those left."""
        self.left[kind] -= count

    def __str__(self) -> str:
        """Return progress such as "3/12 points, about 25 min left"."""
        each = {k: mean(s) if s else self._expected.get(k) for k, s in self._seconds.items() if self.left[k]}
        known = {k: seconds * self.left[k] for k, seconds in each.items() if seconds is not None}
        left = f", about {sum(known.values()) / 60:.0f} min left" if len(known) == len(each) else ""
        return f"{self.points - self.left['points']}/{self.points} points{left}"
