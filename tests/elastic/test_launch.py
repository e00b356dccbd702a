"""Several processes, started by torchrun or accelerate, learn from the same batches what a single process learns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from elastic import trainer
from elastic.config import RunConfig
from elastic.evaluate import measure_run
from elastic.run import Run
from students.checkpoint import read_tensors
from tests.elastic.runs import Configure, as_options, silent
from tests.elastic.several import (
    ACCELERATE,
    FORKED,
    FSDP2,
    TORCHRUN,
    assert_close,
    in_processes,
    launched,
    one_and_two,
)
from tests.pico.language import RUN_SETTINGS

pytestmark = pytest.mark.thorough
LANGUAGE: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "price": (("student.lora.rank=4", "train.batch=3"), {}),
    "accumulation": (("train.accumulation=2", "loss.hidden_weight=0.5", "loss.hidden_layers=all"), {}),
    "range": (("train.batch=4",), {"budget__target": "0.6:1.0"}),
    "hinge": (("train.batch=3",), {"preset": "router-tuning"}),
    "topk": ((), {"preset": "elastiformer", "budget__target": 0.85}),
    "sequence": (("data.prompt=4", "student.routers=[{kind: head, granularity: sequence}]"), {"budget__target": 0.95}),
}
"""Settings of language runs, by name, which together use every kind of term in a loss."""


@pytest.fixture(scope="module")
def runs(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    configs = {name: configure(*settings, **flags) for name, (settings, flags) in LANGUAGE.items()}
    caches = {"one-price": "cache", "two-price": "cache", "two-range": "cache", "two-accumulation": "layers"}
    return one_and_two(configs, tmp_path_factory.mktemp("runs"), caches, TORCHRUN)


@pytest.mark.parametrize("name", LANGUAGE)
def test_two_processes_learn_what_one_does_of_text(name: str, runs: Path):
    assert_close(runs / f"one-{name}", runs / f"two-{name}")


def test_several_processes_share_what_the_teacher_says(runs: Path):
    seen = {name: Run.open(runs / f"two-{name}").about["teacher_cache"] for name in ("price", "range", "accumulation")}
    assert {name: (about["found"], about["asked"]) for name, about in seen.items()} == {
        "price": (18, 0),  # all stored by the run of one process
        "range": (18, 6),  # 24 samples, as its batches are of 4 instead of 3
        "accumulation": (0, 24),
    }
    (kept,) = (path for path in (runs / "cache").iterdir() if path.is_dir())
    keys = [key.numpy().tobytes() for file in kept.iterdir() for key in load_file(file)["keys"]]
    assert len(keys) == len(set(keys)) == 24


def test_two_processes_with_parts_of_the_weights_learn_what_one_does(configure: Configure, runs: Path, tmp_path: Path):
    stopped, names = tmp_path / "stopped", ("price", "hinge")

    def stop(step: int, *_: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt

    configs = {name: configure(*LANGUAGE[name][0], **LANGUAGE[name][1]) for name in names}
    with pytest.raises(KeyboardInterrupt):
        trainer.distill(configs["price"], stopped, progress=stop, say=silent)
    spread: dict[Path, RunConfig | None] = {tmp_path / name: config for name, config in configs.items()}
    in_processes(2, {**spread, stopped: None}, tmp_path, launcher=FSDP2)
    for name in names:
        assert_close(runs / f"one-{name}", tmp_path / name)
    assert_close(runs / "one-price", stopped)
    folders = runs / "two-hinge", tmp_path / "hinge"  # no channel routers: these store whole weights in another order
    whole, parts = (read_tensors(folder / "checkpoint.safetensors")[0] for folder in folders)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    command = ["eval", tmp_path / "price", "--json", "--baselines", "teal"]
    zero = {"ZERO_STAGE": "3", "OFFLOAD_PARAM_DEVICE": "cpu"}  # accelerate's settings for DeepSpeed, same effect
    variables = {f"ACCELERATE_DEEPSPEED_{name}": value for name, value in zero.items()}
    done = launched(2, *command, launcher=FORKED, ACCELERATE_USE_DEEPSPEED="true", **variables)
    row, baseline = json.loads(done.stdout)["rows"]
    assert row["kl"] == pytest.approx(Run.open(tmp_path / "price").about["result"]["kl"], rel=1e-5)
    assert baseline["compute"] == pytest.approx(row["compute"], abs=0.01)


@pytest.mark.parametrize(
    ("fails", "launcher"),
    [("1:4:refuses", FORKED), ("1:4:raises", FORKED), ("0:4:raises", FORKED), ("1:4:dies", TORCHRUN)],
    ids=["all know", "one knows", "the first knows", "none knows"],
)
def test_a_process_that_fails_costs_one_line_and_no_step(
    fails: str, launcher: Sequence[object], runs: Path, model_folder: Path, text_file: Path, tmp_path: Path
):
    """The run ends with a whole last checkpoint and, unless a process died, one error line; it can be resumed."""
    command = [
        "distill",
        "--model",
        model_folder,
        "--data",
        text_file,
        "--target-compute",
        0.8,
        *as_options(RUN_SETTINGS),
    ]
    done = launched(2, *command, "--output", tmp_path / "run", launcher=launcher, FAILS=fails)
    said = [line for line in done.stderr.splitlines() if line.startswith("elastic: ")]
    assert done.returncode != 0 and done.stdout == ""
    if "dies" not in fails:
        assert sum("the batch is odd" in line for line in said) == 1, done.stderr
    if "refuses" in fails:
        assert said == ["elastic: error: the batch is odd"]
    _, about = read_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert about["step"] == 3
    if "dies" not in fails:
        return
    one, two = tmp_path / "one", tmp_path / "run"
    shutil.copytree(two, one)
    trainer.resume(one, say=silent)
    in_processes(2, {two: None}, tmp_path, launcher=FORKED)
    assert_close(one, two)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["distill", "--model", "gpt2", "--set", "train.lr=fast"], "train.lr is 'fast'"),
        (["distill", "--model", "gpt2", "--set", "train.batch=1"], "train.batch is 1, and 2 processes share it"),
        (["sweep", "--model", "gpt2", "--target-compute", "7", "--output", "sweep"], "--target-compute is 7"),
        (["eval", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_what_all_processes_refuse_is_said_once(command: Sequence[str], says: str):
    done = launched(2, *command, launcher=FORKED)
    said = [line for line in done.stderr.splitlines() if line.startswith("elastic: ")]
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith(f"elastic: error: {says}"), done.stderr


def test_what_all_processes_log_is_said_once(model_folder: Path, text_file: Path, tmp_path: Path):
    words = text_file.read_text().split()
    lines = [json.dumps({"text": " ".join(words[n : n + 40])}) for n in range(0, 4000, 40)]
    (tmp_path / "words.jsonl").write_text("\n".join([*lines, "[]"]))
    command = ["distill", "--model", model_folder, "--data", tmp_path / "words.jsonl", "--target-compute", 0.8]
    done = launched(2, *command, *as_options(RUN_SETTINGS), "--output", tmp_path / "run", launcher=FORKED)
    said = [line.split(str(tmp_path))[0] for line in done.stderr.splitlines() if "left out: " in line]
    assert done.returncode == 0 and said == ["left out: ", "1 of 101 records of "], done.stderr


def test_accelerate_launches_a_sweep_with_the_shipped_configuration(
    model_folder: Path, text_file: Path, tmp_path: Path
):
    settings = as_options([setting for setting in RUN_SETTINGS if setting != "train.steps=6"])
    command = ["sweep", "--model", model_folder, "--data", text_file, "--target-compute", 0.7, 0.9, "--steps", 3]
    command += ["--baselines", "random", "--no-bench", "--output", tmp_path / "sweep"]
    done = launched(2, *command, *settings, launcher=ACCELERATE)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()]
    assert [(row["compute_target"], row["baseline"]) for row in rows] == [
        *((budget, baseline) for budget in (0.9, 0.7) for baseline in (None, "random"))
    ]
    assert {row["machine"]["processes"] for row in rows} == {2} and done.stdout.count("4 points") == 1
    (run,) = (tmp_path / "sweep" / "runs").iterdir()
    command = ["eval", run, "--data", text_file, "--compute", 0.8, "--baselines", "uniform", "teal", "--json"]
    ours = json.loads(launched(2, *command, launcher=FORKED).stdout)["rows"]
    options = {"data": str(text_file), "compute": [0.8], "baselines": ["uniform", "teal"]}
    alone = measure_run(str(run), say=silent, **options)
    assert [row["tokens"] for row in ours] == [4000] * 3
    for row, other in zip(ours, alone, strict=True):
        assert row == {key: x if isinstance(x, str) else pytest.approx(x, rel=1e-4) for key, x in other.items()}
