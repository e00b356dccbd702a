"""Sweeps: every point is measured once, also if the sweep is stopped and resumed, and rows say where they come from."""

from __future__ import annotations

import functools
import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from elastic import bench, evaluate, trainer
from elastic.accounting.routing import open_shares, routing_profile
from elastic.cli import main
from elastic.distillation import checkpoints
from elastic.reporting.results import SweepFolder, key_of
from elastic.sweep import Clock, _keys, sweep
from elastic.sweep_tasks import plan
from students import RouterSpec, StudentSpec, elasticize
from students.decisions import Decisions
from tests.elastic.runs import as_options, silent
from tests.pico.language import RUN_SETTINGS


@pytest.fixture(scope="module")
def run_sweep(model_folder: Path, text_file: Path) -> Callable[..., list[dict]]:
    """A function run(folder, **overrides) that sweeps the tiny model into a folder and returns the rows."""

    def run(output: Path, **options: object) -> list[dict]:
        options = {"budgets": [0.7, 0.8, 1.0], "per_budget": True, "timed": False, "say": silent, **options}
        flags = {"models": [str(model_folder)], "settings": RUN_SETTINGS, "data__source": str(text_file)}
        return sweep(output, **{**flags, **options})

    return run


@pytest.fixture(scope="module")
def swept(run_sweep: Callable[..., list[dict]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    run_sweep(folder, command="elastic sweep --output 'a b'")
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions called from here on, in order: distill, resume, measure_run and bench_run."""
    seen = []
    for module, name in ((trainer, "distill"), (trainer, "resume"), (evaluate, "measure_run"), (bench, "bench_run")):
        real = getattr(module, name)
        quick = functools.partial(real, tokens=(8,), new_tokens=2, repeats=1) if name == "bench_run" else real

        def noted(*args: object, name: str = name, quick: Callable = quick, **options: object) -> object:
            seen.append(name)
            return quick(*args, **options)

        monkeypatch.setattr(module, name, noted)
    return seen


def test_every_point_has_a_row_that_says_what_it_is(swept: Path):
    rows = SweepFolder.open(swept).rows()
    assert [row["compute_target"] for row in rows] == [1.0, 0.8, 0.7]
    assert [row["compute"] for row in rows] == pytest.approx([1.0, 0.8, 0.7], abs=0.05)
    for row in rows:
        assert (row["preset"], row["seed"], row["baseline"], row["bench"]) == ("default", 0, None, None)
        assert row["command"] == "elastic sweep --output 'a b'"
        assert {"torch", "elastic-distill", "python"} <= set(row["versions"])
        assert {"platform", "processor", "threads"} <= set(row["machine"])
        assert (swept / row["run"] / "config.yaml").exists() and row["train_steps"] == 6
        assert [key for key, _, _ in row["metrics"]] == ["perplexity_ratio", "kl", "agreement"]
    assert rows[0]["kl"] == 0 and rows[0]["run"] == rows[1]["run"] != rows[2]["run"]


def test_details_say_where_compute_went(swept: Path):
    folder = SweepFolder.open(swept)
    teacher, *rows = folder.rows()
    assert not folder.details(teacher).exists()
    for row in rows:
        details = json.loads(folder.details(row).read_text())
        assert len(details["blocks"]) == len(details["tokens"]) == 3 and details["branches"] == ["attention", "MLP"]
        # a LoRA is large beside 32 channels, so that shares above 1 are possible
        assert all(0 < share < 2 for block in details["blocks"] for share in block)
        assert {len(block) for block in details["tokens"]} == {2 * 32}
        (example,) = details["examples"]
        assert all(piece.strip().startswith("w") for piece, _ in example["pieces"])
        shares = [share for _, share in example["pieces"]]
        assert sum(shares) / len(shares) == pytest.approx(row["compute"], abs=0.1)


def test_what_is_finished_is_not_done_again(
    swept: Path, run_sweep: Callable[..., list[dict]], tmp_path: Path, calls: list[str]
):
    folder = shutil.copytree(swept, tmp_path / "sweep")
    before = (folder / "results.jsonl").read_text()
    assert len(run_sweep(folder)) == 3
    assert calls == [] and (folder / "results.jsonl").read_text() == before
    run_sweep(folder, budgets=[0.7, 0.75, 0.8, 1.0])
    assert calls == ["distill", "measure_run"]
    run_sweep(folder, budgets=[0.7], seeds=[0, 1])
    assert calls[2:] == ["distill", "measure_run"]
    assert [row["seed"] for row in SweepFolder.open(folder).rows()] == [0, 0, 0, 0, 1]


def test_speed_can_be_measured_later(
    swept: Path, run_sweep: Callable[..., list[dict]], tmp_path: Path, calls: list[str]
):
    folder = shutil.copytree(swept, tmp_path / "sweep")
    (row,) = run_sweep(folder, budgets=[0.7], timed=True)
    assert calls == ["measure_run", "bench_run"]
    assert [part["phase"] for part in row["bench"]] == ["prefill", "decode", "train"]
    assert all(part["predicted_speedup"] > 0 and "measured_speedup" in part for part in row["bench"])
    rows = SweepFolder.open(folder).rows()
    assert len(rows) == 3 and rows[2] == json.loads(json.dumps(row))  # replaces the row without timings


def test_a_killed_sweep_goes_on(
    run_sweep: Callable[..., list[dict]], tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "sweep"
    forward, steps = checkpoints.save, []

    def killed(*args: object) -> None:
        forward(*args)
        steps.append(1)
        if len(steps) in (2, 5):  # in the first run, then in the second
            raise KeyboardInterrupt

    for many in (1, 2):  # three checkpoints each
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "save", killed)
            with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
                run_sweep(folder)
        assert len(SweepFolder.open(folder).rows()) == 2 * (many - 1) and len(steps) in (2, 5)
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"run": "runs/tiny-def')  # a line that a kill may cut off
    assert [row["compute_target"] for row in SweepFolder.open(folder).rows()] == [1.0, 0.8]
    calls.clear()
    rows = run_sweep(folder)
    assert calls == ["resume", "measure_run"]
    assert [row["compute_target"] for row in rows] == [1.0, 0.8, 0.7]
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["compute_target"] for line in lines] == [1.0, 0.8, 0.7]


def test_mistakes_come_before_any_work(
    swept: Path, run_sweep: Callable[..., list[dict]], tmp_path: Path, calls: list[str]
):
    for options, message in (
        ({"budgets": [1.0]}, "one of them below 1"),
        ({"budgets": [70.0]}, "above 0 and at most 1"),
        ({"budgets": [0.5, math.nan]}, "above 0 and at most 1"),
        ({"presets": ["default", "statik"]}, "did you mean static"),
        ({"settings": ["train.seed=3"]}, "takes --seed for that"),
    ):
        with pytest.raises(ValueError, match=message):
            run_sweep(tmp_path / "new", **options)
    with pytest.raises(ValueError, match=r"was made with train\.steps 6, not 7"):
        run_sweep(swept, settings=[*RUN_SETTINGS, "train.steps=7"])
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not a sweep folder: name another with --output"):
        run_sweep(tmp_path)
    with pytest.raises(ValueError, match=r"thesis.txt is a file; name a folder"):
        run_sweep(tmp_path / "thesis.txt")
    with pytest.raises(ValueError, match=r"nothing can be kept in .*sweep: .*thesis.txt is a file; name another"):
        run_sweep(tmp_path / "thesis.txt" / "sweep")
    assert calls == [] and [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_one_failure_does_not_stop_the_rest(swept: Path, run_sweep: Callable[..., list[dict]], tmp_path: Path):
    folder, said = shutil.copytree(swept, tmp_path / "sweep"), []
    with pytest.raises(ValueError, match=r"^1 failed, the rest is in .*-0.01-seed0: --target-compute 0.01 is below"):
        run_sweep(folder, budgets=[0.01, 0.75, 0.7], say=said.append)
    assert [row["compute_target"] for row in SweepFolder.open(folder).rows()] == [1.0, 0.8, 0.7, 0.75]
    assert any(line.startswith("failed: tiny-default-0.01-seed0") for line in said)
    [((run, budget, baseline, _), reason)] = SweepFolder.open(folder).failures().items()
    assert (run, budget, baseline) == ("runs/tiny-default-0.01-seed0", 0.01, None) and "0.01 is below" in reason
    with pytest.raises(ValueError, match=r"^--target-compute 0.01 is below"):
        run_sweep(tmp_path / "new", budgets=[0.01])


def test_a_baseline_that_fails_costs_no_other(
    run_sweep: Callable[..., list[dict]], tmp_path: Path, without_random: None
):
    with pytest.raises(ValueError, match=r"^1 failed, .*-0.8-seed0 at 0.8, baseline random: nothing can be drawn here"):
        run_sweep(tmp_path / "sweep", budgets=[0.8], baselines=["random", "static"])
    folder = SweepFolder.open(tmp_path / "sweep")
    assert [row["baseline"] for row in folder.rows()] == [None, "static"]
    assert [key[2] for key in folder.failures()] == ["random"]


def test_results_that_are_no_rows(swept: Path, tmp_path: Path):
    row = json.loads((swept / "results.jsonl").read_text().partition("\n")[0])
    odd = {"kl": None}, {"seed": "0"}, {"machine": []}, {"metrics": [["kl"]]}, {"bench": [{"phase": "decode"}]}
    for line in (b'{"run": 1}\n', b"\xff\n", *(json.dumps({**row, **entry}).encode() + b"\n" for entry in odd)):
        (tmp_path / "results.jsonl").write_bytes(line)
        SweepFolder(tmp_path).prepare()
        with pytest.raises(ValueError, match=r"line 1 of .*results.jsonl is no row"):
            SweepFolder.open(tmp_path).rows()
    with pytest.raises(ValueError, match="is not a sweep folder"):
        SweepFolder.open(tmp_path / "missing")


def test_one_run_serves_a_range(run_sweep: Callable[..., list[dict]], tmp_path: Path, calls: list[str]):
    rows = run_sweep(tmp_path / "sweep", per_budget=False)
    assert calls == ["distill", "measure_run", "measure_run", "measure_run"]
    assert [row["trained_for"] for row in rows] == ["0.7:1.0"] * 3 and len({row["run"] for row in rows}) == 1
    assert [row["compute_target"] for row in rows] == [1.0, 0.8, 0.7]
    assert [row["compute"] for row in rows] == pytest.approx([1.0, 0.8, 0.7], abs=0.05)


def test_runs_of_a_plan(model_folder: Path):
    def names(budgets: list[float], **options: object) -> list[tuple[str, list[float]]]:
        options = {"presets": ["default"], "seeds": [0], "per_budget": True, "settings": RUN_SETTINGS, **options}
        tasks = plan(models=[str(model_folder)], budgets=budgets, flags={}, **options)
        return [(task.name, [budget for budget, _ in task.points]) for task in tasks]

    assert names([0.5, 1.0, 0.75]) == [("tiny-default-0.75-seed0", [1.0, 0.75]), ("tiny-default-0.5-seed0", [0.5])]
    assert names([0.7], per_budget=False, seeds=[3]) == [("tiny-default-0.7-seed3", [0.7])]
    assert [name for name, _ in names([0.7], presets=["default", "static"], seeds=[0, 1])] == [
        f"tiny-{preset}-0.7-seed{seed}" for preset in ("default", "static") for seed in (0, 1)
    ]


def test_models_have_the_baselines_of_their_family(
    model_folder: Path, run_sweep: Callable[..., list[dict]], tmp_path: Path, calls: list[str]
):
    tasks = plan([str(model_folder), "vit-fashion"], [0.7], ["default", "static"], [0], False, [], {})
    text, fixed_text, images, fixed_images = tasks
    asked = ["random", "teal", "tome"]
    assert [key[2] for key in _keys(text, 0.7, asked, None)] == [None, "random", "teal"]
    assert [key[2] for key in _keys(images, 0.7, asked, None)] == [None, "random", "tome"]
    assert [key[2] for key in _keys(fixed_text, 0.7, asked, None)] == [None, "teal"]  # its heads cannot be drawn
    assert [key[2] for key in _keys(fixed_images, 0.7, asked, None)] == [None, "tome"]  # it has no patches to draw
    (skipping,) = plan([str(model_folder)], [0.7], ["default"], [0], False, ["budget.phase=prefill"], {})
    assert [key[2] for key in _keys(skipping, 0.7, ["random", "static"], None)] == [None, "static"]
    with pytest.raises(ValueError, match="no baseline tome for these models and routers, only random, uniform, st"):
        run_sweep(tmp_path / "sweep", baselines=asked)
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_open_gates_and_a_fingerprint(dtype: torch.dtype, llama: PreTrainedModel, tokens: torch.Tensor):
    student = elasticize(llama, StudentSpec((RouterSpec("token", sites=("mlp",), blocks="odd"),)))
    valid = torch.ones_like(tokens, dtype=torch.bool)
    decisions = Decisions(share={"1.mlp.token": (tokens % 2).float()})
    found = routing_profile(student, decisions, tokens.to(dtype), valid, "prefill")
    assert found["tokens"] == [[1000] * 24, (1000 * (tokens % 2)).flatten().tolist(), [1000] * 24]
    assert found["blocks"][0] == found["blocks"][2] == [1, 1]
    mean = float((tokens % 2).float().mean())
    router = 32 / (3 * 32 * 48)  # its share of the MLP's multiply-accumulates
    assert found["blocks"][1] == pytest.approx([1, mean + router], abs=1e-3)
    assert found["sample"] == routing_profile(student, decisions, tokens, valid, "prefill")["sample"]
    assert found["sample"] != routing_profile(student, decisions, tokens + 1, valid, "prefill")["sample"]
    several = Decisions(share={**decisions.share, "1.attn.head": torch.full((2, 12), 0.5)})
    assert torch.equal(open_shares(several, valid, 3)[1], (tokens % 2 + 0.5) / 2)


def test_time_left():
    clock = Clock(runs=2, points=4)
    assert str(clock) == "0/4 points"
    clock.expect("runs", 600)
    assert str(clock) == "0/4 points"  # no point has been timed yet
    with clock.timing("points"):
        pass
    assert str(clock) == "1/4 points, about 20 min left"
    with clock.timing("runs"):
        pass
    clock.skip("points", 2)
    assert str(clock) == "3/4 points, about 0 min left"


def test_the_command_line(model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "sweep"
    arguments = ["sweep", "--model", str(model_folder), "--data", str(text_file), "--eval-data", str(text_file)]
    arguments += as_options(RUN_SETTINGS)
    arguments += ["--target-compute", "0.8", "--no-bench", "--output", str(folder)]
    arguments += ["--teacher-cache", str(tmp_path / "cache")]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "0.800" in out and f"elastic report {folder} -o report.html" in out and "0/1 points" in err
    (row,) = SweepFolder.open(folder).rows()
    assert row["command"].startswith(f"elastic sweep --model {shlex.quote(str(model_folder))}")
    assert row["data"] == str(text_file)
    assert row["tokens"] == 4000 // 32 * 32 and key_of(row)[2] is None
    cache = json.loads((folder / row["run"] / "elastic.json").read_text())["teacher_cache"]
    assert cache == {"folder": str(tmp_path / "cache"), "found": 0, "asked": 12}
    assert main([*arguments, "--steps", "1", "--minutes", "1"]) == 2
