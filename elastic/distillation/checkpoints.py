"""Checkpoints of a run: routers, moments of the optimizer and the state of the training loop, in one file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic import launch
from elastic.files import write_text
from elastic.run import Run
from students import Student
from students.checkpoint import read_tensors, write_tensors

FILE = "checkpoint.safetensors"


@dataclass
class State:
    """What changes while training, besides parameters; all of it is in a checkpoint."""

    step: int
    multiplier: Tensor
    """[K], as are the two below: of each of the budgets that are trained for (see elastic/distillation/budgets.py)."""
    price: Tensor
    offsets: Tensor
    """Where the dial is for them; on the host."""


def save(run: Run, student: Student, optimizer: Any, state: State) -> None:
    """Write a checkpoint; ValueError, and the old one stays, where a parameter is NaN or infinite."""
    if not all(parameter.isfinite().all() for parameter in student.added_parameters().values()):
        raise diverged(run, state, "parameters are no finite numbers")
    names = {parameter: name for name, parameter in student.added_parameters().items()}
    tensors = {f"student.{name}": tensor for name, tensor in student.added_state().items()}
    for parameter, moments in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{names[parameter]}"] = moments[key]
    tensors |= {"multiplier": state.multiplier, "price": state.price, "offsets": state.offsets}
    launch.on_main(lambda: write_tensors(run.folder / FILE, tensors, {"step": state.step}))


def restore(run: Run, student: Student, device: torch.device) -> State | None:
    """Put the routers of the newest checkpoint into the student and return the state; None where there is none yet."""
    if not launch.on_main((run.folder / FILE).exists):
        return None
    tensors, about = _read(run)
    student.load_added_state({n.removeprefix("student."): t for n, t in tensors.items() if n.startswith("student.")})
    multiplier, price = (tensors[name].to(device) for name in ("multiplier", "price"))
    return State(about["step"], multiplier, price, tensors["offsets"])


def restore_optimizer(run: Run, student: Student, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer the moments of the newest checkpoint."""
    tensors, about = _read(run)
    for name, parameter in student.added_parameters().items():
        if f"exp_avg.{name}" in tensors:
            moments = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(about["step"])), **moments}


def _read(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return launch.on_main(lambda: read_tensors(run.folder / FILE))


def cut_metrics(run: Run, step: int) -> None:
    """Drop lines of metrics.jsonl after this step, which a resumed run will write again."""
    path = run.folder / "metrics.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))


def diverged(run: Run, state: State, what: str) -> ValueError:
    """The error of a run that cannot go on, in all processes."""
    kept = (run.folder / FILE).exists()
    return launch.everyones(
        ValueError(
            f"{what} at step {state.step}: stopped; {'the last good' if kept else 'no'} checkpoint is in {run.folder}. "
            f"Try a smaller --set train.lr (now {run.config.train.lr:g})"
        )
    )
