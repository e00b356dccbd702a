"""One student for a range of budgets: trained in one run, set to any of them, for a whole batch or row by row."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

import elastic
from elastic.bench import bench_run
from elastic.cli import main
from elastic.config import BudgetConfig, RunConfig
from elastic.distillation.budgets import draw, trained_budgets
from elastic.evaluate import measure_run
from elastic.families import language
from elastic.run import Run
from elastic.settings import from_dict, to_dict
from students import Student, StudentSpec, elasticize
from students.routers import selection
from tests.elastic.runs import Configure, assert_same_run, distill, interrupt, on_step, resume, silent
from tests.pico.image import make_tiny as make_image
from tests.pico.language import make_tiny
from tests.students.test_execution import SPECS
from tests.students.test_image import SPECS as IMAGE_SPECS
from tests.students.test_students import scramble

SETTINGS = ("data.held_out=24", "train.batch=4", "train.steps=24", "student.lora.rank=8")
RUN = (*SETTINGS, "budget.target=0.6:1.0")
BUDGETS = (0.6, 0.65, 0.72, 0.8, 0.88, 0.95)
ALONE = {name: spec for name, spec in SPECS.items() if all(router.selection != "topk" for router in spec.routers)}
IMAGES = {
    name: routers for name, routers in IMAGE_SPECS.items() if all(router.selection != "topk" for router in routers)
}
OFFSETS = (-1.5, 1.5, math.inf)
"""Offsets of the dial for three rows; infinity makes the last row run as the teacher."""
CLOSE = dict(atol=1e-3, rtol=2e-3)


@pytest.mark.parametrize("value", ["0.5:1.0", "0.5:0.9", "0.25:0.5"])
def test_a_range_survives_flags_files_and_back(value: str, configure: Configure, tmp_path: Path):
    low, high = map(float, value.split(":"))
    (tmp_path / "c.yaml").write_text(f"budget: {{target: {value}}}")
    for config in (
        configure(budget__target=value),
        configure(f"budget.target={value}", budget__target=None),
        configure(budget__target=None, file=str(tmp_path / "c.yaml")),
    ):
        assert config.budget.span == (low, high) and config.student.gains
        assert from_dict(RunConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    assert not configure("student.gains=false", budget__target=value).student.gains
    assert configure(budget__target="0.8").budget.target == 0.8 and not configure().student.gains


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("1.0:0.5", "lower end of a range first"),
        ("0.7:0.7", "lower end of a range first"),
        ("0:0.7", "above 0"),
        ("0.5:1.2", "at most 1"),
        ("0.5:0.7:0.9", "a number such as 0.7, or a range such as 0.5:1.0"),
        ("0.001:1.0", "below what these routers can save"),
    ],
)
def test_a_wrong_range_costs_one_line(
    value: str, says: str, configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = configure()
    given = ["--model", config.model, "--data", config.data.source]
    given += ["--set", "data.window=32", "--set", "train.window=16"]
    assert main(["distill", *given, "--target-compute", value, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("elastic: error: --target-compute") and says in error
    assert not (tmp_path / "run").exists()


def test_what_a_range_cannot_do_is_said(configure: Configure):
    for preset in ("elastiformer", "mixture-of-depths", "router-tuning"):
        with pytest.raises(ValueError, match=r"needs budget\.control=price"):
            configure(preset=preset, budget__target="0.6:1.0")
    with pytest.raises(ValueError, match=r"calibration\.windows"):
        configure("calibration.windows=0", budget__target="0.6:1.0")
    with pytest.raises(ValueError, match=r"student\.gains is True, which has no effect"):
        configure("student.gains=true")


def test_budgets_of_a_batch_cover_the_range():
    knots = trained_budgets(BudgetConfig("0.5:1.0"))
    assert knots[0] == 0.5 and knots[-1] < 1 and list(knots) == sorted(knots)
    seen = torch.stack([draw(knots, 4, seed) @ torch.tensor(knots) for seed in range(200)])
    assert (seen[:, 1:] - seen[:, :-1]).allclose(torch.tensor((knots[-1] - knots[0]) / 4), atol=1e-5)
    assert seen.min() < 0.51 and seen.max() > knots[-1] - 0.01
    assert torch.equal(draw(knots, 4, 7), draw(knots, 4, 7))
    assert draw(trained_budgets(BudgetConfig(0.7)), 3, 0).tolist() == [[1.0]] * 3


def test_every_budget_is_met_on_held_out_text_and_more_is_better(finished: Path):
    rows = measure_run(str(finished), compute=[*BUDGETS, 1.0], say=silent)
    for budget, row in zip((*BUDGETS, 1.0), rows, strict=True):
        assert row["compute_target"] == budget and row["compute"] == pytest.approx(budget, abs=0.015)
    assert all(low["compute"] < high["compute"] for low, high in pairwise(rows))
    assert all(low["kl"] > high["kl"] - 1e-3 for low, high in pairwise(rows))
    assert rows[0]["kl"] > 2 * rows[-2]["kl"] and rows[-1]["kl"] == pytest.approx(0, abs=1e-6)


def test_at_full_compute_it_is_the_teacher_bit_for_bit(finished: Path, tokens: torch.Tensor):
    student = elastic.load(finished)
    low = student(tokens)[0].logits
    student.set_compute(1.0)
    assert torch.equal(student(tokens)[0].logits, make_tiny("llama")(tokens).logits)
    student.set_compute(torch.tensor([1.0, 1.0]))
    assert torch.equal(student(tokens)[0].logits, make_tiny("llama")(tokens).logits)
    student.set_compute(0.6)  # the compute of a student that was just loaded
    assert torch.equal(student(tokens)[0].logits, low)


def test_a_student_is_the_same_wherever_it_is_loaded(finished: Path, tokens: torch.Tensor):
    with torch.inference_mode():
        learns = elastic.load(finished)
        learns(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        cast = elastic.load(finished)
    with torch.no_grad():
        expected = elastic.load(finished)(tokens)[0].logits
        assert all(torch.equal(student(tokens)[0].logits, expected) for student in (learns, cast))
    learns.train()(tokens)[0].logits.sum().backward()
    assert any(parameter.grad is not None for parameter in learns.added_parameters().values())


def test_outside_the_range_is_one_line(finished: Path, capsys: pytest.CaptureFixture):
    student = elastic.load(finished)
    for wrong in (0.59, 1.01, (0.7, 0.3)):
        with pytest.raises(ValueError, match=r"outside what this student can be set to: from 0\.600 to 1\.000"):
            student.set_compute(wrong)
    for wrong in ([], "0.8", [[0.8]], [0.8, None]):
        with pytest.raises(ValueError, match="needs a budget"):
            student.set_compute(wrong)
    for command in (["eval", str(finished)], ["bench", str(finished)], ["generate", str(finished), "--prompt", "w3"]):
        assert main([*command, "--compute", "0.3"]) == 2
        assert "from 0.600 to 1.000" in capsys.readouterr().err.strip().splitlines()[-1]


def test_results_name_their_budgets(finished: Path, capsys: pytest.CaptureFixture):
    about = Run.open(finished).about
    assert [row["compute_target"] for row in about["results"]] == [0.6, 0.8, 1.0]
    assert about["result"] == about["results"][0]
    assert measure_run(str(finished), say=silent) == about["results"]
    line = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"budget", "kl", "compute", "price"} == line["budgets"][0].keys()
    assert main(["eval", str(finished)]) == 0
    common, _, rows = capsys.readouterr().out.partition("asked")
    assert "checkpoint" in common and "0.600" not in common
    assert [line.split()[0] for line in rows.splitlines() if line.strip()[:1].isdigit()] == ["0.600", "0.800", "1.000"]


def test_bench_and_generate_turn_the_dial(finished: Path, capsys: pytest.CaptureFixture):
    rows = bench_run(str(finished), compute=[0.6, 0.9, 1.0], tokens=[16], new_tokens=4, repeats=1, say=silent)
    low, high, dense = (row["compute"] for row in rows if row["phase"] == "decode")
    assert low < high < dense == 1
    assert main(["generate", str(finished), "--prompt", "w3 w4 w5", "--compute", "0.9", "--max-new-tokens", "4"]) == 0
    assert "4 tokens" in capsys.readouterr().err


def test_tasks_are_asked_at_both_ends_and_in_the_middle(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("lm_eval", reason="comes with the extra `tasks`")
    question = {"question": "w3 w4", "choices": ["w5", "w6 w7"], "answer": 1}
    (tmp_path / "own.jsonl").write_text(json.dumps(question))
    command = ["eval", str(finished), "--tasks", str(tmp_path / "own.jsonl")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert all(budget in out for budget in ("0.600", "0.800", "1.000"))
    monkeypatch.setattr("elastic.cli.screen.QUIET_SECONDS", -1)
    monkeypatch.setattr("elastic.harness.scorer.BATCH_TOKENS", 1)
    assert main([*command, "--json", "--compute", "0.7", "0.9"]) == 0
    out, err = capsys.readouterr()
    assert err.count("1 of 2 done") == 3
    rows = json.loads(out)["rows"]
    assert [row["compute_target"] for row in rows] == [0.7, 0.9]
    assert rows[0]["compute"] < rows[1]["compute"]


def test_the_prefill_phase_has_ranges_too(configure: Configure, tmp_path: Path):
    routers = "student.routers=[{kind: token, substitute: 2}]"
    small = (routers, "student.lora.rank=0")  # the preset's substitutes would cost more than this model
    config = configure(*SETTINGS, *small, budget__phase="prefill", budget__target="0.8:1.0")
    distill(config, tmp_path / "run")
    results = Run.open(tmp_path / "run").about["results"]
    assert [row["compute_prefill"] for row in results] == pytest.approx([0.8, 0.9, 1.0], abs=0.03)


def test_a_range_that_the_head_alone_reaches_is_trained(configure: Configure, tmp_path: Path):
    """Closing gates of the LM head suffices for this range, so that all budgets in it have one price and one offset."""
    row = distill(configure(*SETTINGS, "train.steps=3", budget__target="0.999:1.0"), tmp_path / "run")
    assert row["compute"] == pytest.approx(0.999, abs=0.015)


def test_gains_of_one_leave_one_offset_for_all(configure: Configure, tmp_path: Path):
    row = distill(configure(*SETTINGS, "student.gains=false", budget__target="0.7:0.9"), tmp_path / "run")
    assert row["compute"] == pytest.approx(0.7, abs=0.015)
    student = elastic.load(tmp_path / "run")
    assert not [name for name in student.added_parameters() if name.endswith("log_gain")]
    student.set_compute(1.0)
    with pytest.raises(ValueError, match=r"from 0\.700 to 0\.900 and to 1\.0"):
        student.set_compute(0.95)


def test_resuming_a_range_is_the_run_without(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = configure("train.accumulation=2", budget__target="0.6:1.0")
    distill(config, tmp_path / "whole")
    for step in (1, 4):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            on_step(patch, 2 * step, interrupt)
            distill(config, tmp_path / f"cut-{step}")
        resume(tmp_path / f"cut-{step}")
        assert_same_run(tmp_path / "whole", tmp_path / f"cut-{step}")


def test_each_row_is_measured_at_its_budget(finished: Path, tokens: torch.Tensor):
    student = elastic.load(finished)
    config = Run.open(finished).config
    module = language.Distillation(student, config.loss, config.budget, config.data).eval()
    ids = tokens.repeat(2, 1)[:3]
    with torch.no_grad():
        student.set_compute((0.6, 0.8, 1.0))
        _, together = module(ids)
        for place, budget in enumerate((0.6, 0.8, 1.0)):
            student.set_compute(budget)
            _, alone = module(ids[place : place + 1])
            assert together.rows["kl"][place] == pytest.approx(float(alone.rows["kl"][0]), abs=2e-3)
            if budget < 1:  # in a batch, a row of the teacher is charged for routers and corrections
                assert together.rows["compute"][place] == pytest.approx(float(alone.rows["compute"][0]), abs=2e-3)


@torch.no_grad()
def alone(student: Student, offset: float, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return what run() returns when all rows have one offset of the dial (infinity: all run as the teacher)."""
    student.runtime.bypass, student.runtime.offset = offset == math.inf, 0.0 if offset == math.inf else offset
    out = run()
    student.runtime.bypass = False
    return out


@pytest.mark.parametrize(("execution", "gains", "tokens"), [("mask", True, 14), ("skip", False, 14), ("skip", True, 2)])
@pytest.mark.parametrize("name", sorted(ALONE))
def test_each_row_gets_what_it_gets_alone(name: str, execution: str, gains: bool, tokens: int):
    spec = StudentSpec(ALONE[name].routers, ALONE[name].lora, gains)
    student = scramble(elasticize(make_tiny("llama"), spec)).train(False)
    student.runtime.execution = execution
    tokens += max(router.prefix for router in spec.routers)  # of which none is closed
    ids = torch.randint(3, 120, (3, tokens), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, : 5 * (tokens > 5)] = 0
    wanted = [
        alone(student, o, lambda n=n: student(ids[n : n + 1], attention_mask=mask[n : n + 1])[0].logits)
        for n, o in enumerate(OFFSETS)
    ]
    low, high = (alone(student, o, lambda: student(ids)[0].logits) for o in OFFSETS[:2])
    assert not torch.allclose(low, high, **CLOSE)
    student.runtime.offset = OFFSETS
    with torch.no_grad():
        together = student(ids, attention_mask=mask)[0].logits
    for place, expected in enumerate(wanted):
        assert torch.allclose(together[place][mask[place] == 1], expected[0][mask[place] == 1], **CLOSE)


@pytest.mark.parametrize("name", sorted(ALONE))
def test_rows_of_a_cached_generation_keep_their_budgets(name: str):
    student = scramble(elasticize(make_tiny("llama", pad_token_id=None), ALONE[name])).train(False)
    ids = torch.randint(3, 120, (3, 9), generator=torch.Generator().manual_seed(4))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=[])
    wanted = [alone(student, o, lambda n=n: student.generate(ids[n : n + 1], **options)) for n, o in enumerate(OFFSETS)]
    student.runtime.offset = OFFSETS
    assert torch.equal(student.generate(ids, **options), torch.cat(wanted))


def test_beams_share_the_budget_of_their_row(finished: Path):
    student = elastic.load(finished)
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(4))
    options = dict(max_new_tokens=5, do_sample=False, num_beams=3, pad_token_id=0, eos_token_id=None)
    student.set_compute((0.6, 1.0))
    together = student.generate(ids, **options)
    for place, budget in enumerate((0.6, 1.0)):
        student.set_compute(budget)
        assert torch.equal(together[place], student.generate(ids[place : place + 1], **options)[0])


def test_baselines_are_made_at_one_of_its_budgets(finished: Path):
    rows = measure_run(str(finished), compute=[0.8], baselines=language.BASELINES, say=silent)
    assert [row["compute"] for row in rows] == pytest.approx([0.8] * 5, abs=0.03)


def test_budgets_that_do_not_fit_the_batch_are_refused(finished: Path, tokens: torch.Tensor):
    student = elastic.load(finished)
    student.set_compute((0.6, 0.8, 1.0))
    with pytest.raises(ValueError, match="this batch has 2 rows, and budgets were set for 3"):
        student(tokens)
    shutil.copy(finished / "routers.safetensors", finished / "copy.safetensors")
    student.save(finished / "copy.safetensors")
    student.set_compute(0.6)
    student.restore(finished / "copy.safetensors")
    with pytest.raises(ValueError, match="budgets were set for 3"):
        student(tokens)


def test_the_channel_gate_learns_row_by_row():
    x = torch.randn(3, 5, 4, requires_grad=True)
    limit = (0.3 * torch.randn(3, 1, 4)).requires_grad_()
    out, share = selection.channel(x, limit)
    (out.square().sum() + share.square().sum()).backward()
    for row in range(3):
        x_row = x[row : row + 1].detach().requires_grad_()
        limit_row = limit[row, 0].detach().requires_grad_()
        out_row, share_row = selection.channel(x_row, limit_row)
        (out_row.square().sum() + share_row.square().sum()).backward()
        assert torch.equal(out[row : row + 1], out_row) and torch.equal(x.grad[row : row + 1], x_row.grad)
        assert torch.allclose(limit.grad[row, 0], limit_row.grad, atol=1e-6)


@pytest.mark.parametrize(("kind", "execution"), [("timm_fused", "mask"), ("timm_fused", "skip"), ("vit", "skip")])
@pytest.mark.parametrize("name", sorted(IMAGES))
@torch.no_grad()
def test_each_image_gets_what_it_gets_alone(name: str, kind: str, execution: str):
    student = elasticize(make_image(kind), StudentSpec(IMAGES[name], gains=True)).train(False)
    torch.manual_seed(5)
    for parameter in student.added_parameters().values():
        parameter.normal_(0, 0.5)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    student.set_quotas([pixels])
    student.runtime.execution = execution
    wanted = [
        alone(student, o, lambda n=n: student.features(pixels[n : n + 1])[0].pooled) for n, o in enumerate(OFFSETS)
    ]
    student.runtime.offset = OFFSETS
    together, decisions = student.features(pixels)
    assert torch.allclose(together.pooled, torch.cat(wanted), **CLOSE)
    assert all(float(share.expand(3, -1)[2].min()) == 1 for share in decisions.share.values())


@pytest.mark.thorough
def test_image_models_serve_a_range(configure_images: Configure, tmp_path: Path):
    with pytest.raises(ValueError, match=r"0\.6:1\.0 is below what these routers can save: .* 0\.688 of the compute"):
        distill(configure_images(budget__target="0.6:1.0"), tmp_path / "run")
    config = configure_images("train.batch=8", "train.steps=10", budget__target="0.69:1.0")
    distill(config, tmp_path / "run")
    student = elastic.load(tmp_path / "run")
    assert student.stepwise
    rows = measure_run(str(tmp_path / "run"), compute=[0.69, 0.75, 0.8, 0.9, 1.0], say=silent)
    assert [row["compute"] for row in rows] == pytest.approx([0.69, 0.75, 0.8, 0.9, 1.0], abs=0.02)
    with pytest.raises(ValueError, match="--baselines need one compute"):
        measure_run(str(tmp_path / "run"), baselines=["random"], say=silent)
    assert len(measure_run(str(tmp_path / "run"), compute=[0.8], baselines=["random"], say=silent)) == 2
