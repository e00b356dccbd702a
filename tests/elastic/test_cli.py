"""The command line: a mistake costs one line and writes nothing, and results can be read by programs."""

from __future__ import annotations

import errno
import functools
import json
import os
import resource
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic.cli import LESS_MEMORY, main, showing
from elastic.run import Run
from elastic.timing import language
from elastic.timing.passes import Row
from students.kernels.cpu import toolchain
from tests.elastic.runs import as_options
from tests.pico.language import RUN_SETTINGS, make_tiny

ROOT = Path(__file__).parents[2]
ROW = (
    *("model", "preset", "compute_target", "compute", "compute_prefill", "perplexity", "teacher_perplexity"),
    *("perplexity_ratio", "kl", "agreement", "tokens"),
)
SETTINGS = as_options(RUN_SETTINGS)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run every test in an empty working directory of its own; the value is its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ELASTIC_TRACEBACK", raising=False)
    return tmp_path


@pytest.fixture
def arguments(model_folder: Path, text_file: Path) -> list[str]:
    """The arguments of a distillation that takes about a second."""
    return ["distill", "--model", str(model_folder), "--data", str(text_file), *SETTINGS]


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


def run_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elastic.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_distill_prints_a_table_and_names_the_run(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*arguments, "--target-compute", "0.8", "--preset", "default"]) == 0
    out, err = capsys.readouterr()
    for words in ("compute asked", "perplexity ratio", "KL to the teacher", "trainable parameters", "checkpoint"):
        assert words in out
    assert main([*arguments, "--set", "train.steps=0", "--output", "my runs/β"]) == 0
    assert "student: my runs/β   measure it elsewhere: elastic eval 'my runs/β' --data" in capsys.readouterr().out
    assert "0.800 (decode)" in out and "elastic eval runs/tiny-0.8" in out
    assert "step 6/6" in err and "min left" in err
    assert Run.open("runs/tiny-0.8").about["result"]["compute_target"] == 0.8


def test_unknown_and_missing_models(refused: Callable[..., str]):
    assert "unknown model 'smollm2-135': did you mean smollm2-135m" in refused("distill", "--model", "smollm2-135")
    assert "--model smollm2-135m" in refused("distill")


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


def test_resume_continues(finished: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(finished, here / "run")
    (here / "run" / "routers.safetensors").unlink()
    assert main(["distill", "--resume", "run"]) == 0
    out, err = capsys.readouterr()
    assert "resuming at step 6" in err and "student: run" in out
    assert (here / "run" / "routers.safetensors").read_bytes() == (finished / "routers.safetensors").read_bytes()
    assert main(["distill", "--resume", "run"]) == 0
    assert capsys.readouterr() == (out, "run is finished: there is nothing to resume\n")


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


def test_eval_prints_what_it_measured_besides_a_baseline_that_fails(
    finished: Path, capsys: pytest.CaptureFixture[str], without_random: None
):
    assert main(["eval", str(finished), "--baselines", "random", "static", "--json"]) == 2
    printed = capsys.readouterr()
    assert [row["preset"] for row in json.loads(printed.out)["rows"]] == ["default", "static"]
    assert printed.err.endswith("no baseline random: nothing can be drawn here\n")


def test_eval_prints_one_json_object(finished: Path, text_file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(finished), "--json"]) == 0
    out = capsys.readouterr().out
    (row,) = json.loads(out)["rows"]
    assert out.count("\n") == 1 and not [key for key in ROW if key not in row]
    assert row == Run.open(finished).about["result"]
    assert row["perplexity_ratio"] == pytest.approx(row["perplexity"] / row["teacher_perplexity"])
    assert row["tokens"] == 2 * 32

    assert main(["eval", str(finished)]) == 0
    table = capsys.readouterr().out
    for shown in (
        f"{row['compute']:.3f}",
        f"{row['compute_prefill']:.3f}",
        f"{row['perplexity']:.3f}",
        f"{row['teacher_perplexity']:.3f}",
        f"{row['perplexity_ratio']:.4f}",
        f"{row['kl']:.4f} nats",
        f"{row['agreement']:.2%}",
    ):
        assert f" {shown} " in table

    assert main(["eval", str(finished), "--json", "--data", str(text_file), "--compute", "0.75"]) == 0
    (other,) = json.loads(capsys.readouterr().out)["rows"]
    assert other["data"] == str(text_file) and other["tokens"] == 4000 // 32 * 32
    assert other["compute_target"] == 0.75 and other["compute"] == pytest.approx(0.75, abs=0.05)


def test_several_budgets_are_announced_and_no_number_is_cut_in_a_narrow_terminal(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["eval", str(finished), "--compute", "0.7", "0.8"]) == 0
    out, err = capsys.readouterr()
    assert err == "".join(f"measuring on 2 held-out windows at compute 0.{7 + n}, {n + 1} of 2 ...\n" for n in range(2))
    table = [line for line in out.splitlines() if "nats" in line]
    assert len(table) == 2 and "0.700 (decode)" in table[0] and "0.800 (decode)" in table[1]
    assert all("%" in line and "…" not in line for line in table)


def test_long_loops_say_how_far_they_are(
    finished: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Progress goes to stderr: without a terminal as a line now and then, and not at all if a loop is short."""
    arguments = ["eval", str(finished), "--data", str(text_file), "--json"]
    assert main(arguments) == 0
    assert "min left" not in capsys.readouterr().err
    monkeypatch.setattr("elastic.cli.screen.QUIET_SECONDS", -1)
    monkeypatch.setattr("elastic.evaluation.language.BATCH_TOKENS", 1)
    assert main(arguments) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "min left" in line]
    count = int(lines[0].split()[3])
    assert [line.split(" done")[0] for line in lines] == [f"measuring: {n} of {count}" for n in range(1, count)]


def test_generate_prints_text_and_what_it_cost(finished: Path, capsys: pytest.CaptureFixture[str]):
    command = ["generate", str(finished), "--prompt", "w3 w4 w5 w6", "--max-new-tokens", "5"]
    assert main(command) == 0
    whole = capsys.readouterr()
    assert whole.out.strip().startswith("w") and "tokens/s, compute 0." in whole.err
    assert main([*command, "--stream"]) == 0
    assert capsys.readouterr().out == whole.out
    assert main([*command, "--compute", "1.0"]) == 0
    assert "compute 1.000" in capsys.readouterr().err
    dense = [*command, "--compute", "1.0"]
    assert main(dense) == 0 and main([*command, "--lossless"]) == 0
    whole = capsys.readouterr()
    assert len({*whole.out.split("\n")[:2]}) == 1 and "tokens per verification, compute" in whole.err
    assert main([*dense, "--lossless"]) == 0 and "verification" not in capsys.readouterr().err
    assert main([*command[:-1], "1", "--lossless"]) == 0  # a token that the dense model's pass over the prompt gives
    assert capsys.readouterr().err.endswith("tokens/s, compute 1.000\n")


def test_mistakes_in_generate_and_bench(finished: Path, refused: Callable[..., str]):
    assert "--prompt is empty" in refused("generate", finished, "--prompt", "")
    assert "outside what this student" in refused("generate", finished, "--prompt", "w3", "--compute", 0.01)
    assert "--max-new-tokens" in refused("generate", finished, "--prompt", "w3", "--max-new-tokens", 0)
    assert "--batch must be at least 1" in refused("bench", finished, "--batch", 0)
    assert "--new-tokens" in refused("bench", finished, "--new-tokens", 1)
    assert "--lossless is timed with one sequence" in refused("bench", finished, "--lossless", "--batch", 2)


def test_bench_prints_one_json_object(
    finished: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    command = ["bench", str(finished), "--tokens", "8", "--new-tokens", "2", "--repeats", "1"]
    assert main([*command, "--lossless", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    keys = {"phase", "batch", "tokens", "compute", "predicted_speedup", "measured_speedup", "efficiency"}
    assert [row["phase"] for row in rows] == ["prefill", "decode", "train"] and all(keys <= set(row) for row in rows)
    assert [row["phase"] for row in rows if row.get("lossless_seconds", 0) > 0] == ["decode"]
    monkeypatch.setattr(toolchain, "loaded", None)
    monkeypatch.setenv("PATH", str(here))
    monkeypatch.delenv("CC", raising=False)
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "teacher forward" in " ".join(out.split()) and "no C compiler" in err


def test_an_interrupted_bench_prints_what_it_has_timed(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    whole = language.inference

    def interrupted(*arguments: Any) -> Iterator[Row]:
        yield next(whole(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(language, "inference", interrupted)
    assert main(["bench", str(finished), "--tokens", "8", "--repeats", "1", "--json"]) == 130
    out, err = capsys.readouterr()
    assert [row["phase"] for row in json.loads(out)["rows"]] == ["prefill", "train"]
    assert err.endswith("elastic: stopped: these are the rows that were timed before\n")


def test_models(capsys: pytest.CaptureFixture[str]):
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["llama3-8b"]["hub"] == "meta-llama/Meta-Llama-3-8B" and rows["smollm2-135m"]["parameters"] > 1e8
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [
        [row["name"], row["hub"] or "(shipped)"] for row in rows.values()
    ]


def test_info(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["info", str(finished)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) < 50 and "router channel; attn_in, attn_out, mlp_in, mlp_out of all blocks" in lines
    assert "target compute 0.8 (decode)" in lines and any(line.startswith("training 6 steps of ") for line in lines)
    assert any("compute asked" in line for line in lines)
    assert main(["info", str(finished), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["run"] == str(finished) and about["identity"].startswith("llama-")
    assert about["config"]["train"]["steps"] == 6 and about["result"]["compute_target"] == 0.8


def test_help_is_quick_and_loads_no_heavy_library():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run_process("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0 and result.stdout.startswith("usage: elastic") and "examples:" in result.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # of CPU time: others may be busy
    code = "import sys; from elastic.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "argparse" in modules and not {"torch", "transformers", "numpy", "yaml", "rich"} & set(modules)


def test_matplotlib_says_nothing_where_home_cannot_be_written_to(here: Path):
    (here / "home").touch()
    code = "from elastic.cli import main; main(['models', '--json']); import matplotlib; matplotlib.get_cachedir()"
    places = {"HOME": str(here / "home"), "XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": "", "MPLCONFIGDIR": ""}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **places}, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_warnings_of_libraries_take_one_line_without_code(here: Path):
    code = "import warnings; from elastic.cli import main; main(['models', '--json']); warnings.warn('one\\n  two')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "elastic: warning: one two\n")


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_pipe_that_its_reader_has_closed_ends_a_command_quietly(form: list[str]):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "elastic.cli", "models", *form]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(command, cwd=ROOT, env=buffered, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")
    closed = ["sh", "-c", '"$@" >&-', "sh", *command]  # as a service may have it
    result = subprocess.run(closed, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_traceback_on_request(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ELASTIC_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown model"):
        main(["distill", "--model", "nonsense"])


@pytest.mark.thorough
def test_no_network_in_a_process_of_its_own(here: Path):
    """A hub that does not answer is asked once, and costs exactly one line on stderr, and no file."""
    asked: list[object] = []
    with socketserver.TCPServer(("127.0.0.1", 0), lambda *request: asked.append(request)) as hub:  # hangs up
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
        result = run_process(*("distill", "--model", "gpt2"), HF_ENDPOINT=endpoint, HF_HOME=str(here / "hf"))
        hub.shutdown()
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("elastic: error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in ("openai-community/gpt2", endpoint, "HF_HOME"))
    assert len(asked) == 1  # libraries would ask again and again, for half a minute a file
    assert not [path for path in here.rglob("*") if path.is_file()]


def test_ctrl_c_says_how_to_continue(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from elastic import trainer

    def interrupted(*_: object, **__: object) -> None:
        raise trainer.Interrupted("stopped at step 3; continue with: elastic distill --resume run")

    monkeypatch.setattr(trainer, "distill", interrupted)
    assert main(arguments) == 130
    assert capsys.readouterr().err == "elastic: stopped at step 3; continue with: elastic distill --resume run\n"


def test_ctrl_c_while_python_imports_costs_one_line():
    code = """
import sys
class Stopped:
    def find_spec(name, *rest):
        if name == "elastic.cli.parser":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stopped)
import elastic.cli"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "elastic: interrupted\n")


def test_the_first_of_several_processes_does_a_command_alone_whose_work_is_not_shared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Processes are told apart by the environment variables of torchrun, which accelerate launch sets as well."""
    for rank in ("1", "0"):
        for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        assert main(["models"]) == 0
        said = capsys.readouterr()
        assert said.err == "" and ("smollm2-135m" in said.out) == (rank == "0")
