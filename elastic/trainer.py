"""Distillation: load teacher and data, calibrate, train the routers, set the dial, measure."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from elastic import families, launch
from elastic.accounting.peaks import line_of
from elastic.config import BudgetConfig, RunConfig, TrainConfig
from elastic.data_parallel import exchange_left_out
from elastic.distillation import checkpoints
from elastic.distillation.budgets import draw, trained_budgets
from elastic.distillation.checkpoints import State
from elastic.distillation.interrupt import interruptible
from elastic.distillation.loader import loader_of, picked
from elastic.distillation.schedule import Schedule
from elastic.distillation.start import adopted, calibrate, require_reachable, set_budget, set_capacity, untrained
from elastic.distillation.teacher_cache import require_cache
from elastic.evaluate import HELD_OUT, measure
from elastic.evaluation.session import Session
from elastic.files import append_line, require_writable, writing
from elastic.objectives.sums import Sums, of_all
from elastic.reporting.progress import Say
from elastic.run import Run
from elastic.settings import to_dict
from losses import budget_price, budget_prices
from students import Student
from students.kinds.registry import limit_parameters
from teachers import Teacher
from teachers.data.left_out import distinct

Progress = Callable[[int, int | None, dict[str, float]], None]
"""Called at each logging step with (steps done, total number of steps if known, newest metrics)."""

REASONS = 1000
"""The most unusable samples that elastic.json lists with the reason why they were left out."""


class Interrupted(KeyboardInterrupt):
    """Raised after Ctrl-C, or in training after SIGTERM; once the state has been saved, with how to continue."""


def distill(
    config: RunConfig,
    output: str | Path,
    *,
    overwrite: bool = False,
    teacher_cache: str | Path | None = None,
    session: Session | None = None,
    say: Say = print,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Distil a student into the run folder `output`, and return its first row of results (see elastic/evaluate.py).

    overwrite: whether to replace an existing run. teacher_cache: folder in which the teacher's outputs on the training
    data are kept, for this and other runs. session: weights, data and statistics shared with other runs.
    """
    session = session or Session()
    session.memory.turn_to("start")
    launch.in_step(partial(_require, config))
    launch.on_main(lambda: Run(output).refuse_existing(overwrite))
    kept = _cache(teacher_cache)
    teacher, data, student = _load(config, session, session.teacher, say)
    run = launch.on_main(lambda: Run.create(output, config, teacher, overwrite, **kept))
    with _locked(run):
        return _run(run, config, student, data, session, say, progress)


def resume(
    folder: str | Path,
    *,
    teacher_cache: str | Path | None = None,
    session: Session | None = None,
    say: Say = print,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Continue an interrupted run with its own configuration; the result is that of an uninterrupted run. Of a finished
    run, the result that it has.

    teacher_cache: see `distill`; None: the folder that the run has used so far, if any.
    """
    session = session or Session()
    session.memory.turn_to("start")
    run = launch.together(lambda: Run.open(folder))
    if rows := launch.together(lambda: run.results):
        say(f"{run.folder} is finished: there is nothing to resume")
        return rows[0]
    launch.on_main(lambda: require_writable(run.folder / "elastic.json"))
    launch.on_main(run.lock)
    with _locked(run):
        config = launch.together(lambda: run.config)
        launch.in_step(partial(_require, config))
        kept = _cache(teacher_cache)
        _, data, student = _load(config, session, lambda _: run.teacher(session.teacher), say)
        if kept:
            launch.on_main(lambda: run.record(**kept))
        return _run(run, config, student, data, session, say, progress)


@contextmanager
def _locked(run: Run) -> Iterator[None]:
    """Context at whose end a locked run is unlocked, and in which Ctrl-C and an error of the system, such as a full
    disk, say how to continue."""
    how = _how_to_continue(run)
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {how}") from None
    except OSError as error:
        error.add_note(how)
        raise
    finally:
        if launch.is_main():
            run.unlock()


def _how_to_continue(run: Run) -> str:
    return f"continue with: elastic distill --resume {shlex.quote(str(run.folder))}"


def _cache(folder: str | Path | None) -> dict[str, Any]:
    """Return elastic.json's entry for a cache of the teacher's outputs, empty if `folder` is None.

    Raises ValueError if the folder holds something else.
    """
    return {} if folder is None else {"teacher_cache": {"folder": str(launch.on_main(lambda: require_cache(folder)))}}


def _require(config: RunConfig) -> None:
    """Raise ValueError if there are more processes than samples in a batch, or the tracker's package is missing."""
    if config.train.batch < launch.size():
        raise ValueError(
            f"train.batch is {config.train.batch}, and {launch.size()} processes share it: start fewer, or "
            f"--set train.batch={launch.size()}"
        )
    if config.train.tracker == "tensorboard" and find_spec("tensorboard") is None:
        raise ValueError("train.tracker=tensorboard needs a package that is missing: pip install tensorboard")


def _load(
    config: RunConfig, session: Session, load_teacher: Callable[[RunConfig], Teacher], say: Say
) -> tuple[Teacher, Any, Student]:
    """Return the teacher, the data and an untrained student; raise ValueError if they do not fit together."""
    teacher = launch.main_process_first(lambda: load_teacher(config))
    say(f"teacher: {teacher.name}, {teacher.source}")
    student = launch.together(lambda: untrained(config, teacher))
    say(f"data: reading {config.data.source} ...")
    data = launch.main_process_first(lambda: families.load_once(config, session))
    say(f"data: {families.of(config.family).summary(data, config)}")
    launch.together(lambda: require_reachable(student, data, config))
    if config.train.checkpointing:
        launch.in_step(student.checkpoint_blocks)
    return teacher, data, student


def _run(
    run: Run, config: RunConfig, student: Student, data: Any, session: Session, say: Say, progress: Progress
) -> dict[str, Any]:
    session.turn_to(student)
    accelerator = Accelerator(
        log_with=None if config.train.tracker == "none" else config.train.tracker, project_dir=run.folder
    )
    if not launch.spreads():  # spread weights are on their devices already
        student.to(accelerator.device)
    started = time.monotonic()
    state = _train(run, config, student, data, session, accelerator, say, progress)
    session.memory.turn_to("measuring")
    adopted(student, lambda: set_budget(student, data, config, state.offsets.tolist(), say))
    launch.on_main(writing()(partial(student.save, run.routers)))
    kept = session.kept(data.held_out)
    rows = measure(run, student, HELD_OUT, data.held_out, config.budget.measured, kept, say=say)
    exchange_left_out(data.left_out)
    left_out = distinct(data.left_out)
    for part in left_out:
        if len(part) > part.said:
            say(f"data: {part}")
    seconds = run.about.get("seconds", 0) + round(time.monotonic() - started, 1)
    reasons = dict(islice(chain.from_iterable(part.reasons.items() for part in left_out), REASONS))
    peaks = launch.gather(session.memory.stop())
    for number, peak in enumerate(peaks):
        whose = f" of process {number}" if len(peaks) > 1 else ""
        say(f"most memory{whose} besides libraries, GB (without mapped files): {line_of(peak)}")
    about = {"seconds": seconds, "peak_memory": peaks, "left_out": reasons}
    launch.on_main(lambda: run.record(result=rows[0], results=rows, **about))
    return rows[0]


def _train(
    run: Run,
    config: RunConfig,
    student: Student,
    data: Any,
    session: Session,
    accelerator: Accelerator,
    say: Say,
    progress: Progress,
) -> State:
    """Run the training loop, and return its last state.

    The host waits for the device only when it logs, saves or adjusts the number of steps to the time left.
    """
    train, budget = config.train, config.budget
    family = families.of(config.family)
    device = accelerator.device
    distillation = family.Distillation(student, config.loss, budget, config.data)
    loader = loader_of(run, config, data, distillation, device, say)
    own = launch.own_rows(train.batch)

    def part_of(number: int) -> list[int]:
        """Return the numbers of this process's samples in micro-batch `number`, counted from the run's first."""
        return picked(number * train.batch + own.start, len(own), len(loader), train.seed)

    loader.announce(part_of(0), train.steps and train.steps * train.accumulation * train.batch)
    state = _start(run, config, student, data, session, device, say)
    optimizer = _optimizer(student, train)
    if state.step:
        checkpoints.restore_optimizer(run, student, optimizer)
    if train.tracker != "none":
        accelerator.init_trackers("elastic", config={"config": json.dumps(to_dict(config))})
    knots = trained_budgets(budget)
    targets = torch.tensor(knots, device=device)

    def backward() -> tuple[Tensor, Sums, Tensor]:
        """Compute the gradients of a step, summed over all processes.

        Returns the loss of all processes, the sums measured on this process's rows, and these rows' weights [B, K]: row
        b is trained for the budget weights[b] @ targets.
        """
        loss, weights = torch.zeros((), device=device), list[Tensor]()
        measured: Sums | None = None
        for number in range(state.step * train.accumulation, (state.step + 1) * train.accumulation):
            loaded = launch.together(partial(loader.load, part_of(number), following=part_of(number + 1)))
            rows = draw(knots, train.batch, train.seed * 1_000_003 + number * train.batch)[own.start : own.stop]
            weights.append(rows.to(device, non_blocking=True))
            if budget.ranges:
                student.runtime.offset = tuple((rows @ state.offsets).tolist())
            part, seen = distillation(loaded.batch, weights[-1] @ state.price, loader.signals(loaded))
            (part / train.accumulation).backward()
            loss += part.detach() / train.accumulation
            measured = seen if measured is None else measured + seen
        launch.all_reduce_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
        assert measured is not None, "a step has micro-batches"
        return loss, measured, torch.cat(weights)

    schedule = Schedule(train, run.about, state.step)

    def save() -> None:
        checkpoints.save(run, student, optimizer, state)
        loader.flush()
        if train.steps is None:
            launch.on_main(lambda: run.record(trained=schedule.seconds))

    student.runtime.pool = launch.all_gather
    distillation.train()
    session.memory.turn_to("training")
    begun, since_log = state.step, 0
    clock = time.monotonic()
    with interruptible() as interrupted:
        while (steps := schedule.steps(state.step)) is None or state.step < steps:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule.rate(state.step)
            try:
                loss, measured, weights = backward()
            except (ValueError, OSError, RuntimeError) as error:  # the routers are still those after the last step
                if state.step > begun:
                    launch.before_the_end(error, partial(checkpoints.save, run, student, optimizer, state))
                if isinstance(error, launch.Lost):
                    raise launch.Lost(f"{error}; {_how_to_continue(run)}") from error
                raise
            for group in optimizer.param_groups:
                clip_grad_norm_(group["params"], train.clip)
            optimizer.step()
            optimizer.zero_grad()
            if budget.control == "price":
                _update_prices(state, budget, measured.rows["compute"].float(), weights, targets)
            state.step += 1
            since_log += 1

            if schedule.adapt(state.step, loss.item):
                launch.on_main(lambda: run.record(**schedule.decided))
            steps = schedule.steps(state.step)
            done = state.step == steps
            if state.step % train.log_every == 0 or done:
                measured = of_all(measured)
                line = _metrics(state, loss, measured, optimizer, since_log / (time.monotonic() - clock))
                if budget.ranges:
                    line["budgets"] = _by_budget(knots, launch.all_gather(weights), measured, state)
                clock, since_log = time.monotonic(), 0
                if not math.isfinite(line["loss"]):
                    raise checkpoints.diverged(run, state, f"the loss is {line['loss']}")
                if launch.is_main():
                    append_line(run.folder / "metrics.jsonl", json.dumps(line))
                accelerator.log(line, step=state.step)
                progress(state.step, steps, line)
                if state.step % train.save_every < train.log_every or done:
                    save()
            if launch.any_of(interrupted()):
                save()
                raise Interrupted(f"stopped at step {state.step}; {_how_to_continue(run)}")
    if train.tracker != "none":
        accelerator.end_training()
    loader.record(run)
    distillation.eval()
    return state


def _start(
    run: Run, config: RunConfig, student: Student, data: Any, session: Session, device: torch.device, say: Say
) -> State:
    """Return the state to begin with: the newest checkpoint's, or step 0, after calibration unless it is off."""
    budget = config.budget
    set_capacity(student, data, config)
    state = checkpoints.restore(run, student, device)
    launch.on_main(lambda: checkpoints.cut_metrics(run, state.step if state else 0))
    samples = [len(data.train), len(data.held_out)]
    if state is not None:
        launch.together(lambda: checkpoints.require_same_data(run, config.data.source, samples))
        say(f"resuming at step {state.step}")
        return state
    launch.on_main(lambda: run.record(samples=samples))
    knots = trained_budgets(budget)
    price = offsets = torch.zeros(len(knots))
    if config.calibration.windows:
        session.memory.turn_to("calibration")
        start = adopted(student, lambda: calibrate(student, data, config, say, session))
        if budget.control == "price":
            price, offsets = torch.tensor(start.prices), torch.tensor(start.offsets)
    price = price.to(device)
    return State(0, multiplier=price, price=price, offsets=offsets)


def _optimizer(student: Student, train: TrainConfig) -> torch.optim.Optimizer:
    """Return Adam with a group for limits (peak learning rate train.limit_lr) and one for all else (train.lr)."""
    alone = limit_parameters(student.model)
    limits: list[torch.nn.Parameter] = []
    maps: list[torch.nn.Parameter] = []
    for parameter in student.added_parameters().values():
        (limits if parameter in alone else maps).append(parameter)
    groups: list[dict[str, Any]] = [{"params": limits, "peak": train.limit_lr}, {"params": maps, "peak": train.lr}]
    return torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.99))


def _update_prices(state: State, budget: BudgetConfig, compute: Tensor, weights: Tensor, budgets: Tensor) -> None:
    """Update the price of each budget [K] by its miss: the mean of compute - budget over the rows of all processes.

    compute [B] is that of this process's rows. Row b has the budget weights[b] @ budgets and counts for each of the
    budgets [K] with its weight [B, K].
    """
    missed, rows = launch.all_reduce(torch.stack([(compute - weights @ budgets) @ weights, weights.sum(0)]))
    missed = missed / rows.clamp(min=1)
    if budget.ranges:
        state.price = budget_prices(state.price, missed, budget.stiffness)
    else:
        spent, target = budgets + missed, budget.span[0]
        state.price, state.multiplier = budget_price(state.multiplier, spent, target, budget.stiffness)


def _metrics(state: State, loss: Tensor, measured: Sums, optimizer: Any, steps_per_second: float) -> dict[str, Any]:
    """Return a line of metrics.jsonl; the price is the mean over budgets."""
    tokens = float(measured.tokens)
    return {
        "step": state.step,
        "loss": loss.item(),
        "kl": float(measured.kl) / tokens,
        **{f"compute_{p}": float(measured.macs[p] / measured.dense[p]) for p in measured.macs},
        "price": float(state.price.mean()),
        "lr": optimizer.param_groups[-1]["lr"],
        "steps_per_second": steps_per_second,
    }


def _by_budget(knots: tuple[float, ...], weights: Tensor, measured: Sums, state: State) -> list[dict[str, float]]:
    """Return each budget with its price and with the KL and compute of the rows near it, averaged by their weights
    [B, K]; budgets without such rows are left out."""
    lines = []
    weights = weights.to(measured.tokens.device)  # the host, if there are several processes
    for place, budget in enumerate(knots):
        part = weights[:, place] / weights[:, place].sum()
        if bool(part.isfinite().all()):
            seen = {name: float(values.float() @ part) for name, values in measured.rows.items()}
            lines.append({"budget": budget, **seen, "price": float(state.price[place])})
    return lines
