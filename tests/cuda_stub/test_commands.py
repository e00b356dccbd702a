"""Commands on torch's CUDA side, on a stub of CUDA: what they record, launch, wait for and, by the CPU, compute."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic.cli import main
from tests.cuda_stub.build import Unavailable, build, environment
from tests.elastic.runs import as_options
from tests.pico.language import RUN_SETTINGS

ROOT = Path(__file__).parent.parent.parent
Record = dict[str, Any]
RunOnStub = Callable[..., list[Record]]
BENCH = "elastic.cli bench --random-weights --target-compute 0.7 --batch 2 --repeats 1 --set train.batch=1 --json"
PROMPT = ["--prompt", "w3 w4 w5 w6", "--max-new-tokens", "5"]


@pytest.fixture(scope="module")
def on_stub(tmp_path_factory: pytest.TempPathFactory) -> RunOnStub:
    """A function that runs commands in one process on the stub and returns their records (see run.py)."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: bash .ci/gpu")
    folder = tmp_path_factory.mktemp("stub")
    try:
        library = build(folder)
    except Unavailable as reason:
        if "ELASTIC_CI" in os.environ:  # see .ci/run: there it has to run
            raise
        pytest.skip(str(reason))

    def run(*commands: str) -> list[Record]:
        report = folder / "report.json"
        report.unlink(missing_ok=True)
        line = [sys.executable, "-m", "tests.cuda_stub.run", str(report), *commands]
        done = subprocess.run(line, cwd=ROOT, env=environment(library), capture_output=True, text=True, timeout=550)
        assert report.exists(), done.stderr[-5000:]
        records: list[Record] = json.loads(report.read_text())
        said = [record["out"][-5000:] for record in records if record["code"]] + [done.stderr[-5000:]]
        assert [record["code"] for record in records] == [0] * len(commands), "\n".join(said)
        return records

    return run


@pytest.fixture(scope="module")
def probed(on_stub: RunOnStub) -> dict[str, Any]:
    """What probe.py has found out."""
    (record,) = on_stub("tests.cuda_stub.probe")
    assert record["outside"] == 0 and record["problems"] == []
    return json.loads(record["out"])


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ("--model tiny-llm --tokens 8 --new-tokens 3", 2),  # a step of the student, one of the dense model
        pytest.param("--model tiny-vlm --new-tokens 3", 6, marks=pytest.mark.slow),  # and two for each one's prompt
    ],
)
def test_a_bench_records_its_steps(options: str, graphs: int, on_stub: RunOnStub) -> None:
    """Whatever can be recorded is, with no launch beside the capture, and nothing in a capture waits."""
    (made,) = on_stub(f"{BENCH} {options}")
    assert [row["phase"] for row in json.loads(made["out"])["rows"]] == ["prefill", "decode", "train"]
    assert len(made["graphs"]) == graphs and min(made["graphs"]) > 10 and made["replays"] > graphs
    assert (made["outside"], made["refused"], made["problems"]) == (0, 0, [])


def test_a_block_launches_what_is_said(probed: dict[str, Any]) -> None:
    """A block of a recorded decoding step has the launches that students/README.md gives."""
    assert (probed["routed 1"], probed["open 1"]) == (7, 7)
    assert probed["routed 17"] == 11


def test_a_capture_refuses_to_wait(probed: dict[str, Any]) -> None:
    """The stub refuses what CUDA refuses, and the next capture is sound."""
    for work in ("item", "nonzero", "synchronize"):
        assert "CUDA error: operation" in probed[work], work
    assert probed["allowed"] == probed["after"] == ""


@pytest.mark.parametrize(
    "tests",
    [
        "test_decoding.py -k 'llama or fails'",
        pytest.param(
            "test_decoding.py test_prefill.py test_prompts.py test_recorded_images.py", marks=pytest.mark.slow
        ),
    ],
)
def test_what_needs_a_gpu_holds(tests: str, on_stub: RunOnStub) -> None:
    """Tests of recordings that are marked gpu pass here: replays say what the model says, wherever the dial is."""
    (made,) = on_stub("pytest -m gpu -q -p no:cacheprovider " + tests.replace("test_", "tests/students/test_"))
    assert " passed" in made["out"] and "skipped" not in made["out"]
    assert (made["outside"], made["problems"]) == (0, []) and made["replays"] > 10


def test_a_run_is_that_of_a_cpu(
    on_stub: RunOnStub, model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training two steps and generating give the compute and the text of the same commands on the CPU."""
    options = ["--model", str(model_folder), "--data", str(text_file), "--target-compute", "0.8", "--steps", "2"]
    options += as_options([one for one in RUN_SETTINGS if not one.startswith("train.steps")])
    here, there = tmp_path / "cpu", tmp_path / "cuda"
    assert main(["distill", *options, "--output", str(here)]) == 0
    capsys.readouterr()
    assert main(["generate", str(here), *PROMPT]) == 0
    text = capsys.readouterr().out
    trained, generated = on_stub(
        shlex.join(["elastic.cli", "distill", *options, "--output", str(there)]),
        shlex.join(["elastic.cli", "generate", str(there), *PROMPT]),
    )
    assert generated["out"] == text and generated["graphs"] and trained["launches"] > 1000
    assert trained["outside"] == generated["outside"] == 0 and trained["problems"] == generated["problems"] == []
    made, expected = (json.loads((run / "elastic.json").read_text())["result"] for run in (there, here))
    for name in ("compute", "compute_prefill", "kl"):
        assert made[name] == pytest.approx(expected[name], rel=1e-3), name
