"""The length of a run: minutes become steps, and hold if the machine's speed changes and if the run is resumed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path

import pytest

from elastic import trainer
from elastic.config import TrainConfig
from elastic.distillation.schedule import ADAPTATIONS, Schedule
from elastic.families import language
from elastic.files import write_text
from elastic.run import Run
from tests.elastic.runs import Configure, assert_same_run, distill, interrupt, metrics, on_step, resume


def clock(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> Callable[[], float]:
    """Let time pass only in training steps, the n-th of which takes seconds(n) seconds; return the clock."""
    now, steps = [0.0], count(1)
    forward = language.Distillation.forward

    def patched(self: language.Distillation, *args: object, **kwargs: object) -> object:
        if self.training:
            now[0] += seconds(next(steps))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(language.Distillation, "forward", patched)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    return lambda: now[0]


MINUTES = ("train.steps=null", "train.minutes=1", "train.log_every=50", "train.save_every=1")


def test_minutes_become_steps_that_resuming_keeps(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock(monkeypatch, lambda step: 2.0)
    with monkeypatch.context() as patch, pytest.raises(trainer.Interrupted):
        on_step(patch, 7, interrupt)
        distill(configure(*MINUTES), tmp_path / "run")
    assert Run.open(tmp_path / "run").about["steps"] == 30
    resume(tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["step"] == 30 == Run.open(tmp_path / "run").about["steps"]


@pytest.mark.parametrize("later", [0.5, 20.0])
def test_minutes_hold_where_the_machine_changes_its_pace(
    later: float, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run takes its minutes when steps become faster or slower; stopped and resumed, it ends like one not stopped."""

    def pace(step: int) -> float:
        return 2.0 if step <= 9 else later

    with monkeypatch.context() as patch:
        now = clock(patch, pace)
        distill(configure(*MINUTES, "train.minutes=0.5"), tmp_path / "one")
        about, seconds = Run.open(tmp_path / "one").about, now()
    assert 30 - later <= seconds <= 30 + later and 1 < len(about["plan"]) <= 2 + ADAPTATIONS
    assert metrics(tmp_path / "one")[-1]["step"] == about["steps"] == about["plan"][-1][1]
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("checkpoint", "routers"):  # as if killed before the first checkpoint
        (tmp_path / "two" / f"{name}.safetensors").unlink()
    write_text(tmp_path / "two" / "elastic.json", json.dumps({k: v for k, v in about.items() if k != "trained"}))
    clock(monkeypatch, pace)
    with monkeypatch.context() as patch, pytest.raises(trainer.Interrupted):
        on_step(patch, 8, interrupt)
        resume(tmp_path / "two")
    resume(tmp_path / "two")
    assert Run.open(tmp_path / "two").about["plan"] == about["plan"]
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_the_rate_goes_on_from_where_it_is_when_the_end_moves():
    train = TrainConfig(minutes=1.0, warmup=10)
    plain = Schedule(train, {"plan": [(5, 100)]}, 0)
    expected = [0.5 * (1 + math.cos(math.pi * (step - 10) / 90)) for step in range(10, 100)]
    assert [plain.rate(step) for step in range(10, 100)] == expected
    assert [plain.rate(step) for step in range(10)] == [(step + 1) / 10 for step in range(10)]
    moved = Schedule(train, {"plan": [(5, 100), (50, 60), (55, 58)]}, 0)
    rates = [moved.rate(step) for step in range(59)]
    assert rates[:51] == [plain.rate(step) for step in range(51)]
    assert all(a > b for a, b in pairwise(rates[10:])) and rates[58] == pytest.approx(0)
    assert [moved.steps(step) for step in (4, 5, 49, 50, 54, 55)] == [None, 100, 100, 60, 60, 58]
