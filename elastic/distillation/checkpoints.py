"""Checkpoints of a run: routers, the optimizer's moments and the state of the training loop, in one file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elastic import launch
from elastic.files import write_text, writing
from elastic.run import Run
from students import Student
from students.checkpoint import read_tensors, write_tensors

FILE = "checkpoint.safetensors"


@dataclass
class State:
    """The state of the training loop besides parameters and the optimizer's moments; a checkpoint holds all of it.

    K is the number of budgets that are trained for (see elastic/distillation/budgets.py).
    """

    step: int
    multiplier: Tensor
    """Lagrange multiplier [K] of each budget."""
    price: Tensor
    """Price of compute [K] at each budget."""
    offsets: Tensor
    """Offset of the dial [K] for each budget; on the host."""


def save(run: Run, student: Student, optimizer: Any, state: State) -> None:
    """Write a checkpoint; ValueError if a parameter is NaN or infinite, in which case the previous checkpoint stays."""
    if not all(parameter.isfinite().all() for parameter in student.added_parameters().values()):
        raise diverged(run, state, "parameters are no finite numbers")
    names = {parameter: name for name, parameter in student.added_parameters().items()}
    tensors = {f"student.{name}": tensor for name, tensor in student.added_state().items()}
    for parameter, moments in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{names[parameter]}"] = moments[key]
    tensors |= {"multiplier": state.multiplier, "price": state.price, "offsets": state.offsets}
    launch.on_main(writing()(partial(write_tensors, run.folder / FILE, tensors, {"step": state.step})))


def restore(run: Run, student: Student, device: torch.device) -> State | None:
    """Load the newest checkpoint's routers into the student and return its state; None if there is no checkpoint."""
    if not launch.on_main((run.folder / FILE).exists):
        return None
    tensors, about = _read(run)
    routers = {n.removeprefix("student."): t for n, t in tensors.items() if n.startswith("student.")}
    student.load_added_state(routers, run.folder / FILE)
    multiplier, price = (tensors[name].to(device) for name in ("multiplier", "price"))
    return State(about["step"], multiplier, price, tensors["offsets"])


def restore_optimizer(run: Run, student: Student, optimizer: torch.optim.Optimizer) -> None:
    """Load the newest checkpoint's moments into the optimizer."""
    tensors, about = _read(run)
    for name, parameter in student.added_parameters().items():
        if f"exp_avg.{name}" in tensors:
            moments = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(about["step"])), **moments}


def require_same_data(run: Run, source: str, samples: list[int]) -> None:
    """Raise ValueError if a run has other numbers of samples, to train on and held out, than when it began."""
    then = run.about.get("samples", samples)
    if then != samples:
        (had, kept), (has, keeps) = then, samples
        raise ValueError(
            f"{source} has changed since {run.folder} began: {had:,} samples to train on and {kept:,} held out were "
            f"there, and {has:,} and {keeps:,} are now: put it back, or distil anew"
        )


def _read(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return launch.on_main(lambda: read_tensors(run.folder / FILE, "step"))


def cut_metrics(run: Run, step: int) -> None:
    """Remove the lines of metrics.jsonl after this step, which a resumed run writes again, and those that a kill or a
    loss of power has damaged."""
    path = run.folder / "metrics.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if _is_until(line, step)))


def _is_until(line: str, step: int) -> bool:
    """Return whether this is a whole line of metrics.jsonl, of this step or an earlier one."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def diverged(run: Run, state: State, what: str) -> ValueError:
    """Return the error, marked as raised in all processes, of a run that cannot continue; what: the reason."""
    kept = (run.folder / FILE).exists()
    return launch.everyones(
        ValueError(
            f"{what} at step {state.step}: stopped; {'the last good' if kept else 'no'} checkpoint is in {run.folder}. "
            f"Try a smaller --set train.lr (now {run.config.train.lr:g})"
        )
    )
