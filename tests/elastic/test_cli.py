"""The command line: results can be read by people and programs, whatever the terminal, pipe or environment."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic.cli import main
from elastic.run import Run
from elastic.timing import language
from elastic.timing.passes import Row
from students.kernels.cpu import toolchain

ROOT = Path(__file__).parents[2]
ROW = (
    *("model", "preset", "compute_target", "compute", "compute_prefill", "perplexity", "teacher_perplexity"),
    *("perplexity_ratio", "kl", "agreement", "tokens"),
)
pytestmark = pytest.mark.usefixtures("here")


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


def test_resume_continues(finished: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(finished, here / "run")
    (here / "run" / "routers.safetensors").unlink()
    assert main(["distill", "--resume", "run"]) == 0
    out, err = capsys.readouterr()
    assert "resuming at step 6" in err and "student: run" in out
    assert (here / "run" / "routers.safetensors").read_bytes() == (finished / "routers.safetensors").read_bytes()
    assert main(["distill", "--resume", "run"]) == 0
    assert capsys.readouterr() == (out, "run is finished: there is nothing to resume\n")


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
    monkeypatch.setenv("COLUMNS", "24")
    assert main(["eval", str(finished), "--compute", "0.7", "0.8"]) == 0
    out, err = capsys.readouterr()
    assert "…" not in out
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


def test_info(finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert main(["info", str(finished)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) < 50 and "router channel; attn_in, attn_out, mlp_in, mlp_out of all blocks" in lines
    assert "target compute 0.8 (decode)" in lines and any(line.startswith("training 6 steps of ") for line in lines)
    assert any("compute asked" in line for line in lines)
    monkeypatch.setenv("COLUMNS", "0")
    assert main(["info", str(finished)]) == 0
    assert "compute asked" in capsys.readouterr().out
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
