"""Budgets: those that cannot be met are refused before training, others are met, and a missed budget is reported."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic import trainer
from elastic.cli import main
from elastic.config import RunConfig
from elastic.distillation.dial import ROUGH, set_dial, set_range
from elastic.evaluate import HELD_OUT, TOLERANCE, missed
from elastic.run import Run, load
from tests.elastic.runs import Configure, as_options, silent

TEXT = {
    "default": (),
    "prefill": ("budget.phase=prefill", "data.held_out=4", "data.window=64", "train.window=64"),
    "tokens without keys": ("student.routers=[{kind: token, kv: drop}]", "data.held_out=16"),
    "heads and groups": ("student.routers=[{kind: head}, {kind: expert}]", "data.held_out=16"),
    "fixed groups in prefill": ("student.routers=[{kind: expert, network: static}]", "budget.phase=prefill"),
}
IMAGES = {
    "default": (),
    "every block merges": ("student.routers=[{kind: layer, selection: quota, kv: drop, dropped: merge, multiple: 4}]",),
    "patches stay away": ("student.routers=[{kind: layer, kv: drop, dropped: stay}]",),
    "branches": ("student.routers=[{kind: token, kv: drop, selection: quota}]",),
}
CLOSED = re.compile(
    r"is below what these routers can save: with every gate closed (\d\.\d+) of the (?:(\w+) )?compute is left"
)


def refusal(config: RunConfig, folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        trainer.distill(config, folder, say=silent)
    assert not folder.exists()
    return str(error.value)


def check_lowest_budget(name: str, among: dict[str, tuple[str, ...]], configure: Configure, folder: Path) -> None:
    """Assert that the lowest budget that a refusal names is accepted, and met, and that a lower one is refused.

    Runs have the settings `among[name]`. The first entry is trained for that budget and for a range from it, others for
    the two in turn; each is refused both."""
    number, settings = [*among].index(name), ("train.steps=2", *among[name])
    found = CLOSED.search(refusal(configure(*settings, budget__target=0.001), folder / "refused"))
    lowest = float(found.group(1))
    assert CLOSED.search(refusal(configure(*settings, budget__target=f"{lowest - 0.002:.3f}:1.0"), folder / "refused"))
    ways = (lowest, f"{lowest}:1.0")
    for target in ways if number == 0 else ways[number % 2 :][:1]:
        run = folder / str(target).replace(":", "-")
        trainer.distill(configure(*settings, budget__target=target), run, say=silent)
        row = Run.open(run).about["results"][0]
        assert row.get(f"compute_{found.group(2)}", row["compute"]) == pytest.approx(lowest, abs=TOLERANCE)


@pytest.mark.thorough
@pytest.mark.parametrize("name", TEXT)
def test_the_lowest_budget_of_a_language_model(name: str, configure: Configure, tmp_path: Path) -> None:
    check_lowest_budget(name, TEXT, configure, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("name", IMAGES)
def test_the_lowest_budget_of_an_image_model(name: str, configure_images: Configure, tmp_path: Path) -> None:
    check_lowest_budget(name, IMAGES, configure_images, tmp_path)


@pytest.mark.parametrize("routers", ["[{kind: channel}]", "[{kind: vocab}]", "[{kind: head}]"])
def test_routers_that_save_nothing_in_a_phase(routers: str, configure: Configure, tmp_path: Path) -> None:
    config = configure(f"student.routers={routers}", "budget.phase=prefill", "student.lora.rank=0", budget__target=0.95)
    assert "in this phase they save nothing" in refusal(config, tmp_path / "run")


@pytest.mark.parametrize("preset", ["elastiformer", "mixture-of-depths", "router-tuning"])
def test_the_lowest_budget_of_a_capacity(preset: str, configure: Configure, tmp_path: Path) -> None:
    settings = ("calibration.windows=0", "data.held_out=16", "train.steps=2")
    message = refusal(configure(*settings, preset=preset, budget__target=0.001), tmp_path / "run")
    lowest = float(CLOSED.search(message).group(1))
    row = trainer.distill(configure(*settings, preset=preset, budget__target=lowest), tmp_path / "run", say=silent)
    assert row["compute"] == pytest.approx(lowest, abs=TOLERANCE)


def test_a_missed_budget_is_said(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Static routers of three layers can spend few different amounts of compute, so that this budget is missed."""
    monkeypatch.chdir(tmp_path)
    config = configure()
    settings = [
        *("data.window=32", "data.held_out=2", "calibration.windows=4", "train.window=16", "train.batch=2"),
        "student.routers=[{kind: layer, network: static, kv: drop}]",
    ]
    given = ["--model", config.model, "--data", config.data.source, "--steps", "2"]
    given += as_options(settings)
    assert main(["distill", *given, "--target-compute", "0.6", "--output", "run"]) == 3
    out, err = capsys.readouterr()
    spent = Run.open("run").about["result"]["compute"]
    assert f"budget missed: 0.600 was asked for, and {spent:.3f} of the decode compute is spent" in err
    assert "Traceback" not in err and "compute asked" in out and "student: run" in out
    assert main(["distill", *given, "--target-compute", "0.6:1.0", "--output", "range"]) == 3
    assert "budget missed: 0.600 was asked for" in capsys.readouterr().err
    assert main(["distill", "--resume", "run"]) == 3
    assert main(["sweep", *given, "--target-compute", "0.6", "--output", "sweep", "--no-bench"]) == 3
    assert main(["eval", "run"]) == 0


def test_only_a_student_on_its_own_data_misses_a_budget() -> None:
    row = {"compute_target": 0.7, "compute": 0.72, "compute_prefill": 0.7, "phase": "prefill", "data": HELD_OUT}
    assert not missed([row]) and not missed([{**row, "compute_prefill": 0.714}])
    off = {**row, "compute_prefill": 0.68}
    assert len(missed([row, off, off])) == 2
    assert not missed([{**off, "data": "other.txt"}, {**off, "baseline": "random"}])


class Meter:
    """A stand-in for measuring compute: a sigmoid of the dial's offset, shifted where only a part of the data is used.

    `measured` sums up the shares of the data that were used."""

    def __init__(self, student: Any) -> None:
        self.student, self.measured = student, 0.0

    def __call__(self, share: float) -> float:
        self.measured += share
        turned = self.student.runtime.offset + (0.1 if share < 1 else 0.0)
        return 0.2 + 0.8 / (1 + math.exp(-turned))


@pytest.mark.parametrize("target", [0.3, 0.6, 0.9, 0.97])
def test_the_dial_measures_on_all_data_only_near_the_target(target: float) -> None:
    student = SimpleNamespace(runtime=SimpleNamespace(offset=0.0), stepwise=False)
    meter = Meter(student)
    set_dial(student, target, meter, silent)
    assert meter.measured < 3 + 24 * ROUGH
    assert Meter(student)(1.0) == pytest.approx(target, abs=0.001)
    for compute, offset in student.dial:
        student.runtime.offset = offset
        assert Meter(student)(1.0) == pytest.approx(compute, abs=0.001 if abs(compute - target) < 0.01 else 0.02)


def test_the_dial_of_a_range_reaches_both_ends() -> None:
    student = SimpleNamespace(runtime=SimpleNamespace(offset=0.0), stepwise=False, set_compute=lambda budget: None)
    meter = Meter(student)
    set_range(student, (0.35, 0.95), [-0.5, 0.0, 0.5], meter, silent)
    assert meter.measured < 3 + 12 * ROUGH
    assert student.dial[0][0] <= 0.35 and student.dial[-1][0] >= 0.949 and list(student.dial) == sorted(student.dial)
    for compute, offset in student.dial:
        student.runtime.offset = offset
        assert Meter(student)(1.0) == pytest.approx(compute, abs=0.015)


def test_multiples_give_way_to_a_budget(configure_images: Configure, tmp_path: Path) -> None:
    """With 16 patches, a compute of 0.73 lies between two multiples of 4."""
    said: list[str] = []
    routers = "{kind: layer, blocks: odd, selection: quota, multiple: 4, kv: drop, dropped: merge}"
    config = configure_images(f"student.routers=[{routers}]", budget__target=0.73)
    row = trainer.distill(config, tmp_path / "run", say=said.append)
    assert any("any number of them is kept" in line for line in said)
    assert row["compute"] == pytest.approx(0.73, abs=0.02)
    assert load(tmp_path / "run").runtime.multiples == 1
