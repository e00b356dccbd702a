"""Run folders of earlier versions: they open, answer as they did at every position of the dial, and can be resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import elastic
from elastic.evaluate import measure_run
from elastic.run import Run
from students.checkpoint import read_tensors
from tests.elastic.runs import resume, silent

FIXTURES = Path(__file__).parents[1] / "fixtures"
EARLIER = sorted(FIXTURES.glob("runs-*"))
FINISHED = [(folder, run.parent.name) for folder in EARLIER for run in sorted(folder.glob("*/routers.safetensors"))]


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that copies a folder of runs and their models and makes the copy the working directory.

    The paths in these runs are relative to the folder that they were made in."""

    def enter(folder: Path) -> Path:
        copy = shutil.copytree(folder, tmp_path / folder.name)
        monkeypatch.chdir(copy)
        return copy

    return enter


def agree(found: Tensor, stored: Tensor) -> None:
    torch.testing.assert_close(found, stored, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("folder", "name"), FINISHED, ids=lambda value: getattr(value, "name", value))
@torch.no_grad()
def test_a_finished_run_says_what_it_said(at, folder: Path, name: str) -> None:
    at(folder)
    answers = load_file("answers.safetensors")
    images = name.startswith("image")
    given = answers["images" if images else "tokens"]

    def outputs(student) -> Tensor:
        found, _ = student(given)
        return found if images else found.logits[:, -3:]

    student = elastic.load(name)
    agree(outputs(student), answers[f"{name}.asked"])
    places = [key for key in answers if key.startswith(f"{name}.") and key.removeprefix(f"{name}.")[0].isdigit()]
    assert len(places) == (0 if name == "language-elastiformer" else 2)
    for key in places:
        student.set_compute(float(key.removeprefix(f"{name}.")))
        agree(outputs(student), answers[key])
    with student.teacher():
        agree(outputs(student), answers[f"{name}.teacher"])
    if not images:
        student = elastic.load(name)
        tokens = student.generate(given, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(tokens, answers[f"{name}.generated"])


@pytest.mark.parametrize(("folder", "name"), FINISHED, ids=lambda value: getattr(value, "name", value))
def test_its_results_are_measured_again(at, folder: Path, name: str) -> None:
    at(folder)
    for again, stored in zip(measure_run(name, say=silent), Run.open(name).about["results"], strict=True):
        assert stored.keys() <= again.keys()
        for key, value in stored.items():
            if "per_second" in key:
                continue
            if key in ("model", "data") and Path(value).exists():  # earlier versions stored local paths as typed
                value = str(Path(value).absolute())
            assert again[key] == (pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value), key


@pytest.mark.parametrize(("cut", "whole"), [("language-cut", "language-decode"), ("image-cut", "image-merge")])
@pytest.mark.parametrize("folder", EARLIER, ids=lambda folder: folder.name)
def test_a_stopped_run_ends_like_one_that_was_not(at, folder: Path, cut: str, whole: str) -> None:
    at(folder)
    assert read_tensors(Path(cut) / "checkpoint.safetensors")[1]["step"] == 4
    row = resume(cut)
    found, about = read_tensors(Path(cut) / "routers.safetensors")
    stored, about_stored = read_tensors(Path(whole) / "routers.safetensors")
    assert row["compute"] == pytest.approx(Run.open(whole).about["result"]["compute"], abs=1e-3)
    assert found.keys() == stored.keys()
    assert about.keys() - {"multiples"} == about_stored.keys()  # set where a run gave up multiples of patches; newer
    for key, value in stored.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)
