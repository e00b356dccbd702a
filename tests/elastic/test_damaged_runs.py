"""Runs that go wrong: NaNs are never saved, and files that are damaged or of another run are refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError

import elastic
from elastic.cli import main
from students import checkpoint
from students.checkpoint import read_tensors
from tests.elastic.runs import FINISHED, Configure, assert_same_run, distill, files, interrupt, on_step, resume


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "copied")


def nan(loss: torch.Tensor) -> torch.Tensor:
    return loss * torch.nan


def nan_gradient(loss: torch.Tensor) -> torch.Tensor:
    loss.register_hook(nan)
    return loss


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ([], nan),
        ([], nan_gradient),
        (["train.log_every=2"], nan),
        (["train.log_every=2"], lambda loss: interrupt(nan(loss))),
        (["train.log_every=3"], lambda loss: interrupt(nan_gradient(loss))),
    ],
    ids=["loss", "gradient", "between lines", "interrupted", "gradient, interrupted"],
)
def test_nan_stops_and_is_never_saved(
    settings: list[str], change: Callable, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    on_step(monkeypatch, 5, change)
    with pytest.raises(ValueError, match=rf"at step [56].*the last good checkpoint is in {folder}.*train\.lr") as error:
        distill(configure(*settings), folder)
    assert "\n" not in str(error.value)
    tensors, about = read_tensors(folder / "checkpoint.safetensors")
    assert about["step"] in (3, 4) and all(tensor.isfinite().all() for tensor in tensors.values())
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    monkeypatch.undo()
    resume(folder)
    assert files(folder) == FINISHED


def test_nan_before_any_checkpoint_says_so(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    on_step(monkeypatch, 1, nan)
    with pytest.raises(ValueError, match="at step 1: stopped; no checkpoint is in"):
        distill(configure(), tmp_path / "run")


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_truncated_files_are_refused(copied: Path, size: int):
    uses = ("routers", elastic.load), ("routers", resume), ("checkpoint", resume)
    for name, use in uses:
        if name == "checkpoint":
            (copied / "routers.safetensors").unlink()  # with them the run is finished, and needs no checkpoint
        os.truncate(copied / f"{name}.safetensors", size)
        with pytest.raises(ValueError, match=rf"{name}.safetensors is damaged") as error:
            use(copied)
        assert "\n" not in str(error.value)


def test_files_that_lost_their_end_or_contents_are_refused(copied: Path):
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config[: config.index("student:")])
    with pytest.raises(ValueError, match=r"config.yaml is damaged \(it has no section student\): restore it"):
        elastic.load(copied)
    (copied / "config.yaml").write_text(config)
    other = '{"model": "tiny", "identity": "llama-1", "source": 3}'
    for text in ("{}", "[]", "null", '{"model": "tiny"}', other, '{"model"'):
        (copied / "elastic.json").write_text(text)
        with pytest.raises(ValueError, match=r"elastic.json is damaged \(.*\): restore it") as error:
            elastic.load(copied)
        assert "\n" not in str(error.value)


def test_values_of_another_kind_in_elastic_json_cost_one_line(copied: Path, capsys: pytest.CaptureFixture[str]):
    file = copied / "elastic.json"
    about = json.loads(file.read_text())
    row = about["results"][0]
    for changes, said in (
        *(({"results": value}, "lacks results, or has") for value in (3, "x", None, {})),
        ({"seconds": None, "steps": "x"}, "lacks steps, seconds, or has"),
        *(
            ({name: value}, "has no path")
            for name in ("beside", "teacher_cache")
            for value in ({"folder": 3}, {"data": []})
        ),
        *(({"plan": value}, "pairs of whole numbers") for value in ([3], [[5, "6"]], [[1, 2, 3]])),
        *(({"samples": value}, "pairs of whole numbers") for value in ([], [5, "6"])),
        ({"results": [3]}, "its results cannot be shown"),
        ({"results": [{**row, "kl": None}]}, "its results cannot be shown"),
        ({"results": [{key: value for key, value in row.items() if key != "kl"}]}, "shown: 'kl' is missing"),
    ):
        file.write_text(json.dumps(about | changes))
        for command in ["info"], ["distill", "--resume"]:
            assert main([*command, str(copied)]) == 2
            line = capsys.readouterr().err.splitlines()[-1]
            assert line.startswith(f"elastic: error: {file} is damaged") and said in line
    file.write_text(json.dumps(about | {"format": 2}))
    assert main(["eval", str(copied)]) == 2
    assert f"{copied} is of format 2, and this Elastic reads 1: install a newer one" in capsys.readouterr().err
    file.write_text(json.dumps({key: value for key, value in about.items() if key not in ("versions", "machine")}))
    assert main(["info", str(copied)]) == 0


def test_a_run_goes_on_with_the_data_that_it_began_with(copied: Path, text_file: Path, tmp_path: Path):
    (copied / "routers.safetensors").unlink()
    config, cut = yaml.safe_load((copied / "config.yaml").read_text()), tmp_path / "cut.txt"
    cut.write_text(" ".join(text_file.read_text().split()[:2000]))
    (copied / "config.yaml").write_text(yaml.safe_dump(config | {"data": config["data"] | {"source": str(cut)}}))
    with pytest.raises(ValueError, match=rf"{cut} has changed since {copied} began: 123 samples to train on and 2"):
        resume(copied)


def test_student_with_other_routers_is_refused(copied: Path):
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["student"]["lora"]["rank"] = 3
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=rf"{copied}/routers\.safetensors does not fit this student: \d+ names differ"):
        elastic.load(copied)
    (copied / "routers.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{copied}/checkpoint\.safetensors does not fit this student"):
        resume(copied)


def test_settings_and_files_of_another_kind_are_named(copied: Path):
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace("budget:", "budget:\n  later: 3"))
    with pytest.raises(ValueError, match=rf"{copied}/config.yaml: unknown setting 'budget.later'"):
        elastic.load(copied)
    (copied / "config.yaml").write_text(config)
    (copied / "routers.safetensors").unlink()
    (copied / "routers.safetensors").mkdir()
    with pytest.raises(ValueError, match=rf"{copied}/routers.safetensors cannot be read: "):
        elastic.load(copied)


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_tensors() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_full_disk_leaves_no_half_written_file(
    finished: Path, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write, seen = checkpoint.save_file, count(1)

    def save_file(tensors: dict, path: Path, **options: object) -> None:
        write(tensors, path, **options)
        if next(seen) == 2:
            os.truncate(path, 1000)
            no_space_for_tensors()

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(OSError, match="No space left") as error:
        distill(configure(), tmp_path / "run")
    assert "checkpoint.safetensors" in str(error.value) and "\n" not in str(error.value)
    assert files(tmp_path / "run") == FINISHED[:4]
    assert read_tensors(tmp_path / "run" / "checkpoint.safetensors")[1] == {"step": 2}
    resume(tmp_path / "run")
    assert_same_run(finished, tmp_path / "run")


def test_records_of_routers_and_checkpoints_that_are_of_another_kind(copied: Path):
    tensors, about = read_tensors(copied / "routers.safetensors")
    for record, said in (
        *((other, r"lacks offset, capacity, dial, span\)") for other in ({}, [], 3, None, "text")),
        ({**about, "dial": 3}, "its dial cannot be read"),
        ({**about, "offset": "x"}, "its dial cannot be read"),
        ({key: value for key, value in about.items() if key != "span"}, r"lacks span\)"),
    ):
        checkpoint.write_tensors(copied / "routers.safetensors", tensors, record)
        with pytest.raises(ValueError, match=rf"{copied}/routers\.safetensors is damaged.*{said}"):
            elastic.load(copied)
    checkpoint.write_tensors(copied / "routers.safetensors", {n: x * torch.nan for n, x in tensors.items()}, about)
    with pytest.raises(ValueError, match=r"routers\.safetensors is damaged .* holds NaN\)"):
        elastic.load(copied)
    checkpoint.write_tensors(copied / "routers.safetensors", {n: x.long() for n, x in tensors.items()}, about)
    with pytest.raises(ValueError, match=r"is torch\.int64 \[.*\], this student needs torch\.float32 \["):
        elastic.load(copied)
    (copied / "routers.safetensors").unlink()
    checkpoint.write_tensors(copied / "checkpoint.safetensors", tensors, {})
    with pytest.raises(ValueError, match=rf"{copied}/checkpoint\.safetensors is damaged .*lacks step\)"):
        resume(copied)


@pytest.mark.parametrize("full", ["config.yaml", "elastic.json"])
def test_full_disk_at_the_start_leaves_nothing(
    full: str, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = Path.write_text

    def write_text(self: Path, text: str, **options: object) -> int:
        return no_space() if full in self.name and write(self, text[:9]) else write(self, text, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match=rf"{full}: No space left"):
        distill(configure(), tmp_path / "run")
    assert files(tmp_path) == []
