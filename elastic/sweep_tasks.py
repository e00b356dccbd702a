"""The runs of a sweep: their configurations are made, and mistakes found, before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from elastic.config import RunConfig, make_config

FLAGS = {"model": "model", "preset": "preset", "budget.target": "target-compute", "train.seed": "seed"}
"""Settings that distinguish the runs of a sweep, with the option that gives each of them."""


@dataclass(frozen=True)
class Task:
    """One run of a sweep, and the budgets at which it is measured."""

    name: str
    config: RunConfig
    target: str
    """The budget, or range "LOW:HIGH" of budgets, that the run is trained for."""
    points: tuple[tuple[float, float | None], ...]
    """Pairs of a budget and the compute to set the dial to (None: the dial stays where training left it)."""


def plan(
    models: Sequence[str],
    budgets: Sequence[float],
    presets: Sequence[str],
    seeds: Sequence[int],
    per_budget: bool,
    settings: Sequence[str],
    flags: dict[str, Any],
) -> list[Task]:
    """Return the runs of a sweep with their complete configurations; raise ValueError for contradictory options."""
    for setting in settings:
        if (key := setting.partition("=")[0]) in FLAGS:
            raise ValueError(f"--set {setting}: a sweep takes --{FLAGS[key]} for that")
    budgets = sorted(set(budgets), reverse=True)
    below = [budget for budget in budgets if budget < 1]
    if not below or not all(0 < budget <= 1 for budget in budgets):
        raise ValueError(
            f"--target-compute is {' '.join(f'{b:g}' for b in budgets)}; it takes budgets above 0 and at most 1, "
            "one of them below 1"
        )
    runs: list[tuple[str, float | str, tuple[tuple[float, float | None], ...]]]
    if per_budget or len(below) == 1:  # at 1.0 every run is the teacher, so no run is trained for it
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
