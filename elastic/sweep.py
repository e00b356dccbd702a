"""Many runs and budgets in one folder: each distilled, measured, timed and written down; a kill costs one point."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from elastic import bench, evaluate, families, launch, sharding, trainer
from elastic.config import RunConfig, make_config, require_data
from elastic.evaluation.session import Session
from elastic.files import write_text
from elastic.reporting.progress import Say
from elastic.reporting.results import Key, Row, SweepFolder, key_of
from elastic.run import Run, surroundings
from elastic.settings import to_dict

FLAGS = {"model": "model", "preset": "preset", "budget.target": "target-compute", "train.seed": "seed"}
"""Settings that name a sweep's runs, and the options that give them."""


@dataclass(frozen=True)
class Task:
    """One run of a sweep, and the budgets that it is measured at."""

    name: str
    config: RunConfig
    target: str
    """The budget or the range of budgets that it is trained for."""
    points: tuple[tuple[float, float | None], ...]
    """(budget, what the dial is turned to; None: where training left it)."""


@dataclass(frozen=True)
class PointOptions:
    """What is asked of every point."""

    data: str | None
    """What is measured on; None: the run's held-out data."""
    timed: bool
    """Whether speed is measured."""
    command: str
    """What the row says that it was made by."""


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
    """Finish every point of a sweep in the folder `output`, and return the points' rows.

    A point is a run at a budget, or a baseline there; what is finished already is not done again. One run serves all
    the budgets of a model, preset and seed, or each has a run of its own (per_budget). eval_data: what is measured on,
    None being each run's held-out data; timed: whether speed is measured; teacher_cache: as for `distill`; command:
    what a row says it was made by; settings and flags: as for `make_config`. A point that fails is reported and left
    out; ValueError at the end then, or at once where nothing has been finished yet. (One function, as what is missing,
    the clock and the failures are needed at each step.)
    """
    if timed:
        sharding.refuse_timing()

    def prepare() -> list[Task]:
        tasks = plan(models, budgets, presets, seeds, per_budget, settings, flags)
        _require_baselines(baselines, tasks)
        if eval_data is not None:
            for family in {task.config.family for task in tasks}:
                require_data(eval_data, family)
        return tasks

    tasks = launch.together(prepare)
    folder = SweepFolder(output)

    def begin() -> list[Row]:
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
        """Which rows of a point are not there: None for the student's own, or a baseline's name."""
        untimed = timed and finished.get(keys[0], {}).get("bench") is None
        return [key[2] for key in keys if key not in finished or (untimed and key is keys[0])]

    todo = [(task, [point for point in task.points if missing(wanted[task.name, point])]) for task in tasks]
    todo = [(task, points) for task, points in todo if points]
    new = [task for task, _ in todo if not launch.on_main((folder.run(task.name) / "routers.safetensors").exists)]
    clock = Clock(runs=len(new), points=sum(len(points) for _, points in todo))
    if new and new[0].config.train.minutes is not None:
        clock.expect("runs", 60 * new[0].config.train.minutes)
    failures: list[str] = []

    def failed(what: str, error: Exception) -> None:
        if not finished or not launch.is_everyones(error):
            raise error
        failures.append(f"{what}: {str(error).splitlines()[0]}")
        say(f"failed: {failures[-1]}")

    for task, points in todo:
        say(f"[{clock}] {task.name}: {', '.join(f'{budget:g}' for budget, _ in points)}")
        try:
            with clock.timing("runs", counts=task in new):
                _distil(folder.run(task.name), task.config, session, teacher_cache, say, progress)
        except (ValueError, OSError) as error:
            clock.skip("points", len(points))
            failed(task.name, error)
            continue
        for point in points:
            say(f"[{clock}] {task.name} at {point[0]:g}")
            try:
                with clock.timing("points"):
                    kinds = missing(wanted[task.name, point])
                    for row in _measure(folder, task, point, kinds, options, session, failed, say):
                        launch.on_main(partial(folder.append, row))
                        finished[key_of(row)] = row
            except (ValueError, OSError) as error:
                failed(f"{task.name} at {point[0]:g}", error)
    if failures:
        raise ValueError(f"{len(failures)} failed, the rest is in {output}; the first was {failures[0]}")
    return [finished[key] for keys in wanted.values() for key in keys]


def plan(
    models: Sequence[str],
    budgets: Sequence[float],
    presets: Sequence[str],
    seeds: Sequence[int],
    per_budget: bool,
    settings: Sequence[str],
    flags: dict[str, Any],
) -> list[Task]:
    """The runs of a sweep, every one with its whole configuration; ValueError where one of them makes no sense."""
    for setting in settings:
        if (key := setting.partition("=")[0]) in FLAGS:
            raise ValueError(f"--set {setting}: a sweep takes --{FLAGS[key]} for that")
    budgets = sorted(set(budgets), reverse=True)
    below = [budget for budget in budgets if budget < 1]
    if not below or budgets[-1] <= 0 or budgets[0] > 1:
        raise ValueError(
            f"--target-compute is {' '.join(f'{b:g}' for b in budgets)}; it takes budgets above 0 and at most 1, "
            "one of them below 1"
        )
    runs: list[tuple[str, float | str, tuple[tuple[float, float | None], ...]]]
    if per_budget or len(below) == 1:  # at 1.0 every run is the teacher
        runs = [(f"{budget}", budget, ((budget, None),)) for budget in below]
        if budgets[0] == 1:
            target, value, points = runs[0]
            runs[0] = target, value, ((1.0, 1.0), *points)
    else:
        target = f"{budgets[-1]}:{budgets[0]}"
        runs = [(target, target, tuple((budget, budget) for budget in budgets))]
    tasks: list[Task] = []
    for model, preset, seed, (target, value, points) in product(
        dict.fromkeys(models), dict.fromkeys(presets), dict.fromkeys(seeds), runs
    ):
        chosen = {"model": model, "preset": preset, "train__seed": seed, "budget__target": value}
        config = make_config(settings=list(settings), **flags, **chosen)
        name = f"{Path(model).name}-{preset}-{target.replace(':', '-')}-seed{seed}"
        if any(task.name == name for task in tasks):
            raise ValueError(f"two of the models are called {Path(model).name}: sweep them into different folders")
        tasks.append(Task(name, config, target, points))
    return tasks


def _keys(task: Task, budget: float, baselines: Sequence[str], data: str | None) -> list[Key]:
    """What the rows of a point are known by, the student's own first, then baselines that the model's family has; at
    1.0, where it is the teacher, none."""
    known = families.of(task.config.family).BASELINES
    kinds = (None, *dict.fromkeys(kind for kind in baselines if kind in known and budget < 1))
    return [(f"runs/{task.name}", budget, kind, data or evaluate.HELD_OUT) for kind in kinds]


def _require_baselines(baselines: Sequence[str], tasks: Sequence[Task]) -> None:
    """ValueError for a baseline that none of the models has; where one has it, the others go without."""
    known = list(dict.fromkeys(name for task in tasks for name in families.of(task.config.family).BASELINES))
    for name in baselines:
        if name not in known:
            raise ValueError(f"there is no baseline {name} for these models, only {', '.join(known)}")


def _require_same(path: Path, config: RunConfig) -> None:
    """ValueError where the run folder is there and was made with other settings."""
    if not _started(path):
        return
    old, new = (_flat(to_dict(c)) for c in (Run.open(path).config, config))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{path} was made with {key} {old.get(key)}, not {new.get(key)}: name another folder with --output"
            )


def _started(path: Path) -> bool:
    return (path / "config.yaml").exists() and (path / "elastic.json").exists()


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """A nested dictionary as one of dotted keys."""
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
    """Make the run, continue it, or leave it as it is where it is finished."""
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
    failed: Callable[[str, Exception], None],
    say: Say,
) -> Iterator[Row]:
    """The rows of a point that are missing; writes its details, too."""
    budget, turn = point
    path = str(folder.run(task.name))
    baselines = [kind for kind in kinds if kind is not None]
    turns = () if turn is None else (turn,)
    what: dict[str, Any] = {"data": options.data, "compute": turns, "session": session, "say": say}
    try:
        measured = evaluate.measure_run(path, baselines=baselines, **what)
    except ValueError as error:
        if not baselines:
            raise
        failed(f"{task.name} at {budget:g}, baselines {', '.join(baselines)}", error)
        measured, baselines = evaluate.measure_run(path, **what), []
    run = Run.open(path)
    metrics = families.of(task.config.family).METRICS
    for row, baseline in zip(measured, (None, *baselines), strict=True):
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
            if turn != 1:  # there it is the teacher, which routes nothing
                details = launch.together(partial(routing_details, path, turn, session))
                launch.on_main(partial(_write_details, folder, row, details))
            if options.timed:
                row["bench"] = launch.on_main(partial(bench.bench_run, path, compute=turns, say=say))
        yield row


def routing_details(path: str, turn: float | None, session: Session | None = None) -> dict[str, Any]:
    """Where the compute of a finished run goes, the dial turned to `turn` (see elastic/accounting/routing.py).

    What is looked at is the same for every seed, so that runs can be compared: what seed 0 holds out.
    """
    session, run = session or Session(), Run.open(path, finished=True)
    config, student = run.config, session.student(run)
    if turn is not None:
        student.set_compute(turn)
    sample = session.data(replace(config, train=replace(config.train, seed=0))).held_out
    return families.of(config.family).routing(student, sample, session.loaded(config), config)


def _write_details(folder: SweepFolder, row: Row, details: dict[str, Any]) -> None:
    file = folder.details(row)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(details) + "\n")


class Clock:
    """Counts what is done and says how long the rest takes, going by what its like took."""

    def __init__(self, runs: int, points: int) -> None:
        self.left = {"runs": runs, "points": points}
        self.points = points
        self._seconds: dict[str, list[float]] = {"runs": [], "points": []}
        self._expected: dict[str, float] = {}

    def expect(self, kind: str, seconds: float) -> None:
        """How long one takes, as long as none has been timed."""
        self._expected[kind] = seconds

    @contextmanager
    def timing(self, kind: str, counts: bool = True) -> Iterator[None]:
        """Time one, and count it as done however it ends; counts: whether it was among those that were left."""
        started = time.monotonic()
        try:
            yield
            if counts:
                self._seconds[kind].append(time.monotonic() - started)
        finally:
            self.left[kind] -= counts

    def skip(self, kind: str, count: int) -> None:
        """So many will not be done."""
        self.left[kind] -= count

    def __str__(self) -> str:
        """Such as "3/12 points, about 25 min left"."""
        each = {k: mean(s) if s else self._expected.get(k) for k, s in self._seconds.items() if self.left[k]}
        known = {k: seconds * self.left[k] for k, seconds in each.items() if seconds is not None}
        left = f", about {sum(known.values()) / 60:.0f} min left" if len(known) == len(each) else ""
        return f"{self.points - self.left['points']}/{self.points} points{left}"
