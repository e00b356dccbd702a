"""A mistake on the command line costs one line and exit code 2, and writes nothing."""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from elastic.cli import LESS_MEMORY, main, showing
from elastic.run import Run
from tests.pico.language import make_tiny

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], here: Path) -> Callable[..., str]:
    """A function that runs a command, asserts that it fails with one line and changes no file, and returns the line."""

    def run(*arguments: object) -> str:
        before = {path: path.lstat().st_mtime_ns for path in here.rglob("*")}
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capfd.readouterr()
        assert out == "" and "Traceback" not in err
        errors = [line for line in err.splitlines() if line.startswith("elastic: error:")]
        assert errors == err.splitlines()[-1:]
        assert {path: path.lstat().st_mtime_ns for path in here.rglob("*")} == before
        return errors[0]

    return run


def test_unknown_and_missing_models(finished: Path, refused: Callable[..., str]):
    assert "unknown model 'smollm2-135': did you mean smollm2-135m" in refused("distill", "--model", "smollm2-135")
    assert "--model smollm2-135m" in refused("distill")
    assert f"{finished} is a run (`elastic info` names its model): --model takes" in refused(
        "distill", "--model", finished
    )
    assert "elastic.json is a file: --model takes the folder" in refused("plan", "--model", finished / "elastic.json")


def test_errors_of_the_system_are_named_by_what_they_concern(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    for error, line in (
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "my.txt"), "my.txt: Permission denied"),
        (OSError("the hub is away\nmore"), "the hub is away"),
    ):
        monkeypatch.setattr(showing, "models_command", functools.partial(_raise, error))
        assert refused("models") == f"elastic: error: {line}"


def _raise(error: Exception, *_: object) -> None:
    raise error


def test_mistakes_in_settings(arguments: list[str], refused: Callable[..., str]):
    assert "did you mean static?" in refused(*arguments, "--preset", "statik")
    assert "did you mean lr?" in refused(*arguments, "--set", "train.lrr=1")
    assert "no such configuration file: missing.yaml" in refused(*arguments, "--config", "missing.yaml")
    assert "--steps or --minutes" in refused("distill", "--model", "gpt2", "--steps", "5", "--minutes", "1")
    assert "0.7 means 70 %" in refused(*arguments, "--target-compute=-0.5")
    said = refused(*arguments, "--set", "family=vit")
    assert "family is vit, but " in said and said.endswith(" is a model of text alone: leave it away")
    classes = ["distill", "--model", "vit-fashion", "--set"]
    assert all("from 0" in refused(*classes, f"data.classes={given}") for given in ("[]", "[-1]"))


def test_memory_that_is_too_small_costs_one_line(arguments: list[str], refused: Callable[..., str]):
    line = refused(*arguments, "--set", "student.lora.rank=10000000000000")
    assert "can't allocate memory" in line and line.endswith(f"; {LESS_MEMORY}")


def test_unreachable_target_states_the_lowest(
    arguments: list[str], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    settings = ("--set", "student.routers=[{kind: head}]", "--set", "student.lora.rank=0", "--target-compute")
    message = refused(*arguments, *settings, "0.2")
    assert "--target-compute 0.2 is below" in message and "of the decode compute is left" in message
    monkeypatch.setattr("elastic.families.language.load", lambda *_: pytest.fail("data was read"))
    assert refused(*arguments, *settings, "0.2") == message


def test_data_that_cannot_be_used(arguments: list[str], finished: Path, refused: Callable[..., str], here: Path):
    (here / "empty.txt").write_text("")
    assert "no such file or folder: missing.txt" in refused(*arguments, "--data", "missing.txt")
    assert "empty.txt is too short: 0 tokens found, 96 needed" in refused(*arguments, "--data", "empty.txt")
    for source in ("emty.txt", "./empty", "some/where/else", "word"):  # noticed before the model is looked for
        assert "no such file or folder" in refused("distill", "--model", "gpt2", "--data", source)
    assert "fashion-mnist is data for an image model" in refused(
        "distill", "--model", "gpt2", "--data", "fashion-mnist"
    )
    (here / "notes" / "deep").mkdir(parents=True)
    (here / "notes" / "deep" / "table.csv").write_text("text")
    (here / "link.txt").symlink_to("gone.txt")
    for source, words in (
        ("link.txt", "link.txt is a link to gone.txt, which is not there"),
        ("notes/deep/table.csv", "unknown kind of file: notes/deep/table.csv; --data takes a .txt"),
        ("notes", "no .txt, .md, .jsonl, .json, .parquet file in folder notes; --data takes a .txt"),
        ("/dev/null", "/dev/null is neither a file nor a folder; --data takes a .txt"),
    ):
        assert words in refused("distill", "--model", "gpt2", "--data", source)
        assert words in refused("eval", finished, "--data", source)
    assert "did you mean builtin?" in refused("distill", "--model", "gpt2", "--data", "buildin")
    assert "did you mean empty.txt?" in refused("distill", "--model", "gpt2", "--data", "emty.txt")
    windows = ("--set", "data.window=128", "--set", "train.window=128")
    assert "data.window is 128, but" in refused(*arguments, *windows)  # tiny models have 64 positions


def test_existing_folders_are_kept(arguments: list[str], finished: Path, refused: Callable[..., str], here: Path):
    shutil.copytree(finished, here / "run")
    message = refused(*arguments, "--output", "run")
    assert all(option in message for option in ("--resume run", "--overwrite", "--output"))
    (here / "other").mkdir()
    (here / "other" / "thesis.txt").write_text("years of work")
    for overwrite in ((), ("--overwrite",)):
        assert "not a run folder" in refused(*arguments, "--output", "other", *overwrite)
    (here / "link").symlink_to("gone")
    assert "link is a link to gone, which is not there" in refused(*arguments, "--output", "link")
    for output in ("other/thesis.txt", "other/thesis.txt/run"):
        assert "other/thesis.txt is a file; name" in refused(*arguments, "--output", output)
    before = (here / "run" / "routers.safetensors").read_bytes()
    assert main([*arguments, "--output", "run", "--overwrite", "--set", "train.seed=3"]) == 0
    assert Run.open("run").config.train.seed == 3
    assert (here / "run" / "routers.safetensors").read_bytes() != before
    (here / "empty").mkdir()
    assert main([*arguments, "--output", "empty", "--set", "train.steps=0"]) == 0


@pytest.mark.parametrize("command", [["eval"], ["info"], ["distill", "--resume"]])
def test_folders_that_are_no_run(command: list[str], refused: Callable[..., str], here: Path):
    (here / "folder").mkdir()
    for folder in ("folder", "missing"):
        assert f"{folder} is not a run folder" in refused(*command, folder)
    assert "elastic: error: two\\nlines is not a run folder" in refused(*command, "two\nlines")


def test_a_run_that_another_process_trains_is_left_alone(
    arguments: list[str], finished: Path, refused: Callable[..., str], here: Path
):
    (shutil.copytree(finished, here / "run") / "routers.safetensors").unlink()
    other = Run("run")
    other.lock()
    again = [*arguments, "--output", "run"]
    for command in (["distill", "--resume", "run"], again, [*again, "--overwrite"]):
        assert "another process is training into run: wait" in refused(*command)
    other.unlock()
    for _ in range(2):  # a finished command holds it no longer
        assert main([*again, "--overwrite"]) == 0


def test_a_prompt_of_bytes_that_are_no_text(finished: Path, refused: Callable[..., str]):
    prompt = b"gr\xc3\xb6sse".decode("ascii", "surrogateescape")  # as Python reads it with LC_ALL=C
    assert "--prompt has bytes that are no text in this locale" in refused("generate", finished, "--prompt", prompt)


@pytest.mark.parametrize("extra", [["--model", "gpt2"], ["--set", "train.lr=1"], ["--overwrite"], ["--steps", "3"]])
def test_resume_takes_no_other_settings(extra: list[str], finished: Path, refused: Callable[..., str]):
    message = refused("distill", "--resume", finished, *extra)
    assert f"leave {extra[0]} away" in message


@pytest.mark.parametrize("extra", [["--epochs", "3"], ["--start", "folder"]])
def test_a_recipe_of_stages_takes_no_epochs(extra: list[str], refused: Callable[..., str]):
    assert f"{extra[0]} is for image models" in refused("pretrain", "--data", "easy-vqa", "--output", "new", *extra)


def test_unfinished_and_damaged_runs(finished: Path, refused: Callable[..., str], here: Path):
    run = shutil.copytree(finished, here / "run")
    assert "0.01 is outside what this student can be set to" in refused("eval", "run", "--compute", "0.01")
    assert "--compute is 70.0" in refused("eval", "run", "--compute", "70")
    os.truncate(run / "routers.safetensors", 1000)
    assert "routers.safetensors is damaged" in refused("eval", "run")
    (run / "routers.safetensors").unlink()
    assert "not finished: continue it with elastic distill --resume run" in refused("eval", "run")
    (run / "config.yaml").write_text("model: [")
    assert "config.yaml is not YAML" in refused("info", "run")
    os.truncate(run / "elastic.json", 20)
    assert "run/elastic.json is damaged" in refused("info", "run")


def test_run_of_other_weights(finished: Path, refused: Callable[..., str], here: Path, model_folder: Path):
    model = shutil.copytree(model_folder, here / "model")
    shutil.copytree(finished, here / "run")
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    (here / "run" / "config.yaml").write_text(yaml.safe_dump({**config, "model": "model"}))
    assert main(["eval", "run"]) == 0
    other = make_tiny("llama")
    other.model.norm.weight.data.mul_(2)
    other.save_pretrained(model)
    assert "run was made for other weights" in refused("eval", "run")
    (here / "run" / "routers.safetensors").unlink()
    assert "run was made for other weights" in refused("distill", "--resume", "run")


def test_mistakes_in_generate_and_bench(finished: Path, refused: Callable[..., str]):
    assert "--prompt is empty" in refused("generate", finished, "--prompt", "")
    assert "outside what this student" in refused("generate", finished, "--prompt", "w3", "--compute", 0.01)
    assert "--max-new-tokens" in refused("generate", finished, "--prompt", "w3", "--max-new-tokens", 0)
    assert "--batch must be at least 1" in refused("bench", finished, "--batch", 0)
    assert "--new-tokens" in refused("bench", finished, "--new-tokens", 1)
    assert "--lossless is timed with one sequence" in refused("bench", finished, "--lossless", "--batch", 2)
