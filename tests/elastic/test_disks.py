"""A disk that is full or read-only costs one line that says how to go on, and no run, sweep or file is left damaged."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from elastic import run, sweep, trainer
from elastic.cli import main
from elastic.files import Unwritable, append_line
from elastic.reporting import results
from students import checkpoint
from students.kernels.cpu import toolchain
from teachers.cache import published
from teachers.data import corpus
from teachers.data.images import load_images
from tests.elastic.runs import as_options
from tests.pico.language import RUN_SETTINGS

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def arguments(model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments, after a command, that make the run of `finished`, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    given = ["--model", str(model_folder), "--data", str(text_file), "--target-compute", "0.8"]
    return [*given, *as_options(RUN_SETTINGS)]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Context in which this process can write no file beyond `size` bytes: a write stops there, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    append_line(file, "one")
    with files_of_at_most(8), pytest.raises(OSError, match=f"cannot write {file}: File too large"):
        append_line(file, "two" * 5, sync=True)
    append_line(file, "three")
    assert file.read_text() == "one\nthree\n"


def test_a_run_on_a_full_disk_is_resumed(
    arguments: list[str], finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lines = list[str]()

    def until_full(path: Path, line: str) -> None:
        if len(lines) == 3:
            raise OSError(f"cannot write {path}: No space left on device")
        lines.append(line)
        append_line(path, line)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "append_line", until_full)
        assert main(["distill", *arguments, "--output", "run"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "elastic: error: cannot write run/metrics.jsonl: No space left on device; "
        "continue with: elastic distill --resume run"
    )
    assert main(["distill", "--resume", "run"]) == 0
    assert Path("run/routers.safetensors").read_bytes() == (finished / "routers.safetensors").read_bytes()
    assert Path("run/metrics.jsonl").read_text().count("\n") == 6


def test_a_sweep_on_a_full_disk_goes_on(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command = ["sweep", *arguments, "--no-bench", "--output", "sweep"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "append_line", partial(_raise, FULL))
        assert main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "elastic: error: No space left on device; the same command goes on from here"
    assert main(command) in (0, 3)
    assert len(Path("sweep/results.jsonl").read_text().splitlines()) == 1
    assert sweep.SweepFolder.open("sweep").rows()[0]["baseline"] is None


def test_a_sweep_whose_rows_find_no_room_goes_on(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A full disk is no failure of the point at which it shows: nothing after it could be written either."""
    command = ["sweep", *arguments, "--target-compute", "0.8", "1.0", "--no-bench", "--output", "sweep"]
    written = list[Path]()

    def until_full(path: Path, line: str, **options: bool) -> None:
        if written:
            raise Unwritable(f"cannot write {path}: No space left on device")
        written.append(path)
        append_line(path, line, **options)

    with monkeypatch.context() as patch:
        patch.setattr(results, "append_line", until_full)
        assert main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    said = "cannot write sweep/results.jsonl: No space left on device; the same command goes on from here"
    assert line == f"elastic: error: {said}" and not Path("sweep/failures.jsonl").exists()
    assert main(command) in (0, 3)
    assert len(Path("sweep/results.jsonl").read_text().splitlines()) == 2


def test_a_sweep_whose_checkpoints_find_no_room_goes_on(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command = ["sweep", *arguments, "--target-compute", "0.8", "0.9", "--per-budget", "--no-bench", "--output", "sweep"]
    for name in "checkpoint", "routers":
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", partial(_until_full, name, checkpoint.save_file))
            assert main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("elastic: error: cannot write sweep/runs/") and f"{name}.safetensors: " in error
        assert error.endswith("No space left on device (os error 28); the same command goes on from here")
        assert not Path("sweep/failures.jsonl").exists()
    assert main(command) in (0, 3)
    assert len(Path("sweep/results.jsonl").read_text().splitlines()) == 2


def _until_full(name: str, write: Callable[..., None], tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
    if name in path.name and any(path.parent.parent.glob("*/routers.safetensors")):  # one run has found room
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    write(tensors, path, **options)


def test_folders_that_cannot_be_written_to_are_refused_before_a_model_is_loaded(
    arguments: list[str], finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (Path(shutil.copytree(finished, "run")) / "routers.safetensors").unlink()
    monkeypatch.setattr(trainer, "_load", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write wherever modes forbid it
    for command in (
        ["distill", *arguments, "--output", "new"],
        ["distill", "--resume", "run"],
        ["pretrain", "--data", "fashion-mnist", "--output", "teacher"],
        ["pretrain", "--data", "easy-vqa", "--output", "teacher"],
    ):
        assert main(command) == 2
        line, *others = capsys.readouterr().err.splitlines()
        assert not others and line.startswith("elastic: error: ") and "cannot be written to" in line


def test_a_cache_that_cannot_be_written_to_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(corpus, "collect", lambda: pytest.fail("text was collected for a minute"))
    for cache, hint in (tmp_path / "file", "; ELASTIC_CACHE=FOLDER keeps it elsewhere"), (tmp_path / "cache", ""):
        monkeypatch.setenv("ELASTIC_CACHE", str(cache))
        with pytest.raises(OSError) as error, published(tmp_path / "file" / "a" / "text"):
            pytest.fail("there is a folder below a file")
        assert str(error.value) == f"cannot write {tmp_path / 'file' / 'a' / 'text'}: Not a directory{hint}"
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot write .*ELASTIC_CACHE=FOLDER"):
        corpus.corpus_file()


def test_a_cache_that_cannot_keep_kernels_is_said_once(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(toolchain, "loaded", None)
    said = (
        f"which is slower: {tmp_path / 'file' / 'cache'} cannot keep what is compiled (Not a directory); C kernels need"
    )
    for command in ["eval", str(finished)], ["generate", str(finished), "--prompt", "w3", "--max-new-tokens", "2"]:
        run._warn.cache_clear()
        for times in (1, 0):
            assert main(command) == 0
            assert capsys.readouterr().err.count(said) == times


def test_weights_and_routers_that_may_not_be_read_are_not_called_missing(
    arguments: list[str],
    finished: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Safetensors reports a file without permission as one that does not exist."""
    weights = model_folder / "model.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != weights)
        assert main(["distill", *arguments, "--output", "run"]) == 2
    assert f"{weights} cannot be read: permission denied" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "safe_open", partial(_raise, FileNotFoundError("No such file or directory")))
    with pytest.raises(ValueError, match=r"routers\.safetensors may not be read"):
        checkpoint.read_tensors(finished / "routers.safetensors")
    with pytest.raises(ValueError, match=r"missing\.safetensors does not exist"):
        checkpoint.read_tensors(finished / "missing.safetensors")


def test_a_table_of_images_that_no_cache_can_take_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "images.parquet"
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    image = {"bytes": (tmp_path / "image.png").read_bytes(), "path": None}
    datasets.Dataset.from_dict({"image": [image] * 4}).to_parquet(file)
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", lambda *_, **__: _raise(FULL))
    with pytest.raises(ValueError, match=r"images\.parquet cannot be read: .*No space left on device"):
        load_images(str(file), pil_to_tensor, held_out=1, seed=0)


def _raise(error: Exception, *_: object, **__: object) -> None:
    raise error
