"""Whole runs on a tiny model: complete folders, resuming bit for bit, and nothing bad ever saved."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

import elastic
import teachers
from configs import presets
from elastic import trainer
from elastic.accounting.language import measured_compute
from elastic.accounting.peaks import line_of
from elastic.bench import bench_run
from elastic.cli import main
from elastic.distillation import dial
from elastic.distillation.loader import picked
from elastic.evaluate import measure_run
from elastic.families import language
from elastic.files import write_text
from elastic.run import Run
from elastic.settings import to_dict
from elastic.timing import passes
from losses import forward_kl
from students.checkpoint import read_tensors
from students.execution.wrapper import Wrapper
from teachers.load import fingerprint
from tests.elastic.runs import (
    FINISHED,
    Configure,
    assert_same_run,
    distill,
    files,
    interrupt,
    metrics,
    on_step,
    resume,
    silent,
)
from tests.pico.language import make_tiny, make_tokenizer

ROOT = Path(__file__).parents[2]


LORA = "student.lora.rank=8"
"""A setting that adds low-rank corrections, so that these are trained, saved and resumed as well."""
RUN = (LORA,)


@pytest.mark.parametrize("preset", [*presets(), "prefill", "experts"])
def test_every_preset_runs_and_is_the_teacher_at_full_compute(preset: str, configure: Configure, tmp_path: Path):
    if preset == "prefill":  # in models this small, routers and substitutes are a large share of compute
        long = ("data.window=64", "train.window=64")  # of which the first 16 tokens skip nothing
        config = configure(*long, preset="default", budget__phase="prefill", budget__target=0.95)
    elif preset == "experts":
        make_tiny("mixtral").save_pretrained(tmp_path / "model")
        make_tokenizer(words=117).save_pretrained(tmp_path / "model")
        config = configure(preset="default", model=str(tmp_path / "model"), budget__target=0.7)
    else:
        config = configure(preset=preset)
    row = distill(config, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert files(run.folder) == FINISHED
    assert run.config == config
    assert run.about["result"] == row and run.about["model"] == config.model
    assert [line["step"] for line in metrics(run.folder)] == [1, 2, 3, 4, 5, 6]
    assert measure_run(str(run.folder), say=silent) == [row]
    assert 0 <= row["kl"] < 3 and row["tokens"] > 0 and 0 < row["compute"] < 1.2
    assert metrics(run.folder)[0]["lr"] > 0
    assert config.budget.control == "price" or {line["price"] for line in metrics(run.folder)} == {0}
    if preset == "prefill":
        return
    student, ids = elastic.load(run.folder), torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(3))
    student.set_compute(1.0)
    model = make_tiny("mixtral" if preset == "experts" else "llama")
    assert torch.equal(student(ids)[0].logits, model(ids).logits)
    (row,) = measure_run(str(run.folder), compute=[1.0], say=silent)
    assert row["compute"] == pytest.approx(1) and row["kl"] == pytest.approx(0, abs=1e-6)
    student.set_compute(student.dial[0][0])
    assert not torch.equal(student(ids, use_cache=False)[0].logits, model(ids).logits)


def test_compute_on_held_out_text_is_what_was_asked(configure: Configure, tmp_path: Path):
    config = configure("data.held_out=24", "train.steps=20", "train.batch=4")
    assert distill(config, tmp_path / "run")["compute"] == pytest.approx(0.8, abs=0.01)


def test_loaded_student_is_the_one_that_was_measured(finished: Path, tmp_path: Path):
    ids = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(3))
    student = elastic.load(finished)
    out = student(ids)[0].logits
    assert not student.training and not torch.equal(out, make_tiny("llama")(ids).logits)
    assert torch.equal(out, elastic.load(str(finished))(ids)[0].logits)
    student.save(tmp_path / "saved.safetensors")
    other = elastic.load(finished)
    other.set_compute(1.0)
    with torch.no_grad():
        for parameter in other.added_parameters().values():
            parameter.add_(1)
    other.restore(tmp_path / "saved.safetensors")
    assert other.dial == student.dial and torch.equal(other(ids)[0].logits, out)


@torch.no_grad()
def test_quality_is_that_of_the_students_logits(finished: Path):
    run, row = Run.open(finished), Run.open(finished).about["result"]
    teacher = run.teacher()
    student, windows = run.load_student(teacher), language.load(run.config, teacher).held_out
    own = student(windows)[0].logits
    with student.teacher():
        exact = student(windows)[0].logits
    for name, logits in (("perplexity", own), ("teacher_perplexity", exact)):
        lost = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        assert row[name] == pytest.approx(float(lost.exp()), rel=1e-4)
    assert row["kl"] == pytest.approx(float(forward_kl(own.flatten(0, 1), exact.flatten(0, 1)).mean()), rel=1e-3)
    assert row["agreement"] == pytest.approx(float((own.argmax(-1) == exact.argmax(-1)).float().mean()))


def test_checkpoints_hold_routers_only(finished: Path):
    base = {tuple(p.shape) for n, p in make_tiny("llama").named_parameters() if "embed" in n or "proj" in n}
    tensors, _ = read_tensors(finished / "routers.safetensors")
    assert tensors.keys() == elastic.load(finished).added_state().keys()
    assert not [name for name, tensor in tensors.items() if tuple(tensor.shape) in base]


def test_a_loaded_student_has_its_weights_laid_out(
    finished: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    student = elastic.load(finished)
    student.set_compute(student.dial[0][0])

    def laid_out_again(self: Wrapper) -> None:
        raise AssertionError("a call lays weights out")

    for kind in {type(module) for module in student.modules() if isinstance(module, Wrapper)}:
        monkeypatch.setattr(kind, "lay_out", laid_out_again)
    with torch.no_grad():
        student(tokens)


def test_set_compute_turns_the_dial(finished: Path, configure: Configure):
    student = elastic.load(finished)
    config = configure(LORA)
    windows = language.load(config, Run.open(finished).teacher()).train[:16]
    lowest, highest = student.dial[0][0], student.dial[-1][0]
    spent = []
    for compute in (lowest, 0.7 * lowest + 0.3 * highest, 0.3 * lowest + 0.7 * highest, highest):
        student.set_compute(compute)
        spent.append(measured_compute(student, windows, "decode", config.data.prompt))
        later = measured_compute(student, windows, "decode", config.data.prompt, after=8)
        assert spent[-1] == pytest.approx(compute, abs=0.1) == later
    assert spent == sorted(spent)
    for compute in (lowest - 0.01, highest + 0.01):
        with pytest.raises(ValueError, match=f"{lowest:.3f} to {highest:.3f}"):
            student.set_compute(compute)


def test_same_seed_same_run_and_the_base_is_untouched(
    finished: Path, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = configure(LORA)
    teacher = teachers.load(config.model, dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in teacher.model.named_parameters()}
    monkeypatch.setattr(teachers, "load", lambda *_, **__: teacher)
    distill(config, tmp_path / "run")
    assert_same_run(finished, tmp_path / "run")
    after = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in teacher.model.named_parameters()
        if not parameter.requires_grad
    }
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert Run.open(finished).about["identity"] == teacher.identity == fingerprint(make_tiny("llama"))


def test_other_seed_other_run(finished: Path, configure: Configure, tmp_path: Path):
    distill(configure(LORA, "train.seed=1"), tmp_path / "run")
    assert metrics(tmp_path / "run") != metrics(finished)


@pytest.mark.parametrize("preset", ["default", "elastiformer"])
def test_ctrl_c_and_resume(preset: str, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = configure("train.log_every=3", preset=preset)
    distill(config, tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)
    for step in (1, 4):  # neither is a logging step
        cut = tmp_path / f"cut-{step}"
        with monkeypatch.context() as patch, pytest.raises(trainer.Interrupted, match=f"step {step}.*--resume"):
            on_step(patch, step, interrupt)
            distill(config, cut)
        assert signal.getsignal(signal.SIGINT) is before
        assert files(cut)[:3] == FINISHED[:3] and not Run(cut).routers.exists()
        resume(cut)
        assert_same_run(tmp_path / "whole", cut)


def test_ctrl_c_while_progress_is_shown(finished: Path, configure: Configure, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        distill(configure(LORA), tmp_path / "run", progress=lambda step, *_: interrupt() if step == 3 else None)
    resume(tmp_path / "run")
    assert_same_run(finished, tmp_path / "run")


@pytest.mark.parametrize("phase", ["calibrate", "set_budget", "measure"])
def test_ctrl_c_outside_of_training_says_how_to_continue(
    phase: str, finished: Path, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(trainer.Interrupted, match=f"--resume {tmp_path / 'run'}"):
        patch.setattr(trainer, phase, stop)
        distill(configure(LORA), tmp_path / "run")
    resume(tmp_path / "run")
    assert_same_run(finished, tmp_path / "run")


KILLED = """
import os, signal, sys, yaml
from elastic import trainer
from elastic.config import RunConfig, from_dict
from students.execution.wrapper import Wrapper
from students import checkpoint

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def distil_and_die(config, folder, moment):
    save, seen = checkpoint.save_file, []
    def save_file(tensors, path, **options):
        save(tensors, path, **options)
        seen.append(path)
        if moment == "while saving" and len(seen) == 2:
            os.truncate(path, 1000)
            die()
    checkpoint.save_file = save_file
    trainer.distill(config, folder, progress=lambda step, *_: die() if str(step) == moment else None)

config = from_dict(RunConfig, yaml.safe_load(sys.stdin))
for folder in sys.argv[1:]:
    child = os.fork()
    if not child:
        distil_and_die(config, folder, os.path.basename(folder))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


@pytest.mark.thorough
def test_kill_at_any_moment_and_resume(finished: Path, configure: Configure, tmp_path: Path):
    saved_before = {"1": False, "5": True, "while saving": True}
    result = subprocess.run(
        [sys.executable, "-c", KILLED, *(tmp_path / moment for moment in saved_before)],
        cwd=ROOT,
        input=yaml.safe_dump(to_dict(configure(LORA))),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for moment, saved in saved_before.items():
        folder = tmp_path / moment
        assert (folder / "checkpoint.safetensors").exists() == saved and not Run(folder).routers.exists()
        with (folder / "metrics.jsonl").open("ab") as file:  # damaged lines, then one of which half was written
            file.write(b'\0\0\0\0\n\xb5\n[]\n{"step": "x"}\n{"step": 6, "lo')
        resume(folder)
        assert files(folder) == FINISHED
        assert_same_run(finished, folder)


def test_resuming_a_finished_run_says_so_and_touches_nothing(finished: Path, tmp_path: Path):
    copied, said = shutil.copytree(finished, tmp_path / "copied"), []
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copied.iterdir()}
    assert trainer.resume(copied, say=said.append) == Run.open(finished).about["result"]
    assert said == [f"{copied} is finished: there is nothing to resume"]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copied.iterdir()} == before


def test_a_run_killed_while_it_is_measured_is_measured(finished: Path, tmp_path: Path):
    copied = shutil.copytree(finished, tmp_path / "copied")
    about = Run(copied).about
    write_text(copied / "elastic.json", json.dumps({k: v for k, v in about.items() if k not in ("result", "results")}))
    assert resume(copied) == about["result"]
    assert_same_run(finished, copied)


def test_accumulated_micro_batches_are_one_batch(configure: Configure, tmp_path: Path):
    for name, setting in {"whole": "train.batch=4", "parts": "train.accumulation=2"}.items():
        distill(configure(setting), tmp_path / name)
    (whole, _), (parts, _) = (read_tensors(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-4, rtol=1e-2, msg=name)
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert b == pytest.approx(a, rel=1e-3)


def test_tensorboard_gets_the_metrics(configure: Configure, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distill(configure("train.tracker=tensorboard"), tmp_path / "run")
    (folder,) = {path.parent for path in (tmp_path / "run").rglob("events.out.*") if path.parent.name == "elastic"}
    events = EventAccumulator(str(folder)).Reload().Scalars("kl")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert events[-1].value == pytest.approx(metrics(tmp_path / "run")[-1]["kl"])


def test_missing_tensorboard_is_an_error(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trainer, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        distill(configure("train.tracker=tensorboard"), tmp_path / "run")
    assert files(tmp_path) == []


def test_data_that_training_sees_is_a_function_of_the_step():
    pieces = [picked(first, 3, 7, seed=0) for first in range(0, 21, 3)]
    seen = [piece for micro in pieces for piece in micro]
    assert all(sorted(seen[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert seen[:7] != seen[7:14]
    assert picked(5, 4, 7, seed=0) == seen[5:9]


def test_no_steps_measure_the_closed_form_start_and_say_how_far_the_dial_is(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dial, "PAUSE", 0.0)
    said: list[str] = []
    row = trainer.distill(configure("train.steps=0"), tmp_path / "run", say=said.append)
    assert row["compute"] == pytest.approx(0.8, abs=0.05)
    assert measure_run(str(tmp_path / "run"), say=silent) == [row]
    assert any(re.match(r"\d+ offsets? measured, compute 0\.\d+ to ", line) for line in said)
    (peaks,) = Run.open(tmp_path / "run").about["peak_memory"]
    assert list(peaks) == ["start", "calibration", "training", "measuring"]
    assert "most memory besides libraries, GB (without mapped files): " + line_of(peaks) in said


def test_bench_measures_every_phase_against_the_dense_model(finished: Path):
    rows = bench_run(str(finished), batch=[1, 2], tokens=[24], new_tokens=4, repeats=2, say=silent)
    assert [(r["phase"], r["batch"]) for r in rows] == [
        *(("prefill", 1), ("prefill", 2), ("decode", 1), ("decode", 2), ("train", 2)),
    ]
    for row in rows:
        assert row["measured_speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        assert row["efficiency"] == pytest.approx(row["measured_speedup"] / row["predicted_speedup"])
        assert row["peak_bytes"] > 0 and row["dense_peak_bytes"] > 0
        assert row["threads"] >= 1 and row["dtype"] == "float32"
    decode, pair, train = rows[2:]
    assert decode["predicted_speedup"] == pytest.approx(1 / decode["compute"])
    assert 1 < decode["predicted_speedup_bytes"] < 2
    assert decode["compute"] < pair["compute"]  # with two sequences, no channel is skipped
    assert decode["cache_bytes"] == decode["dense_cache_bytes"] > 0
    assert train["teacher_forwards"] == pytest.approx(train["seconds"] / train["dense_seconds"])
    assert train["cached_teacher_forwards"] > 0
    assert train["ideal_teacher_forwards"] == pytest.approx(1 + 2 * train["compute"])


@pytest.mark.parametrize(("asked", "enough", "turns"), [(3, 0.0, 3), (None, 0.0, 2), (None, 60.0, 5)])
def test_long_passes_are_timed_at_least_twice(
    asked: int | None, enough: float, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "ENOUGH", enough)
    calls: list[None] = []
    passes.medians({"work": lambda: calls.append(None)}, asked, torch.device("cpu"))
    assert len(calls) == 1 + turns


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be forgotten here")
def test_peaks_are_those_of_their_own_work():
    works = {"large": lambda: torch.ones(50_000_000), "small": lambda: torch.ones(1)}
    _, peaks = passes.medians(works, 1, torch.device("cpu"))
    assert peaks["large"] > peaks["small"] + 100_000_000


def test_records_that_were_left_out_are_named_in_the_run(
    configure: Configure,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = text_file.read_text().split()
    lines = [json.dumps({"text": " ".join(words[n : n + 40])}) for n in range(0, 4000, 40)]
    lines[6] = '{"text": null}'
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    config, said = configure(data__source=str(tmp_path / "words.jsonl")), []
    trainer.distill(config, tmp_path / "run", say=said.append)
    (name,) = Run.open(tmp_path / "run").about["left_out"]
    assert name == f"{tmp_path / 'words.jsonl'}, line 7"
    number = f"1 of 100 records of {tmp_path / 'words.jsonl'} are left out: broken, or of no use"
    assert caplog.messages.count(number) == 1 and not any(number in line for line in said)  # said when they were read
    assert main(["eval", str(tmp_path / "run"), "--data", str(tmp_path / "words.jsonl"), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count(f"left out: {name}: ") == 1 and json.loads(captured.out)["rows"][0]["tokens"] > 3000
