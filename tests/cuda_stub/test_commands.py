"""Commands on torch's CUDA side, on a stub of CUDA: what they record, launch, wait for and compute."""

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

pytestmark = pytest.mark.thorough
ROOT = Path(__file__).parent.parent.parent
Record = dict[str, Any]
Together = tuple[dict[str, Record], Path]
RunOnStub = Callable[..., list[Record]]
BENCH = "elastic.cli bench --random-weights --target-compute 0.7 --repeats 1 --set train.batch=1 --json"
SHORT = "--batch 1 --tokens 8 --new-tokens 3 --set data.window=32 --set train.window=32"
"""Options for few numbers, and for kernels that the check of a new student has compiled."""
PROMPT = ["--prompt", "w3 w4 w5 w6 w7 w8 w9", "--max-new-tokens", "5"]
RECORDINGS = "decoding", "gated_steps", "prefill", "prompts", "recorded_images", "texts"
GPU_TESTS = "pytest -m gpu -q -p no:cacheprovider"


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

    def run(*commands: str, **more: str) -> list[Record]:
        report = folder / "report.json"
        report.unlink(missing_ok=True)
        line = [sys.executable, "-m", "tests.cuda_stub.run", str(report), *commands]
        made = environment(library) | more
        done = subprocess.run(line, cwd=ROOT, env=made, capture_output=True, text=True, timeout=1800)
        assert report.exists(), done.stderr[-5000:]
        records: list[Record] = json.loads(report.read_text())
        said = [record["out"][-5000:] for record in records if record["code"]] + [done.stderr[-5000:]]
        assert [record["code"] for record in records] == [0] * len(commands), "\n".join(said)
        return records

    return run


@pytest.fixture(scope="module")
def training(model_folder: Path, text_file: Path) -> list[str]:
    """Options of `elastic distill` for two steps of a tiny run."""
    options = ["--model", str(model_folder), "--data", str(text_file), "--target-compute", "0.8", "--steps", "2"]
    return options + as_options([one for one in RUN_SETTINGS if not one.startswith("train.steps")])


@pytest.fixture(scope="module")
def together(on_stub: RunOnStub, training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Together:
    """Records, by name, of commands in one process, since each process imports all libraries; and the run's folder."""
    run = tmp_path_factory.mktemp("runs") / "cuda"
    commands = {
        "bench": f"{BENCH} --model tiny-llm {SHORT}",
        "probe": "tests.cuda_stub.probe",
        "distill": shlex.join(["elastic.cli", "distill", *training, "--output", str(run)]),
        "generate": shlex.join(["elastic.cli", "generate", str(run), *PROMPT]),
        "tests": f"{GPU_TESTS} tests/students/test_decoding.py tests/students/test_texts.py "
        "tests/students/test_gated_steps.py -k 'llama or fails or substitute-1 or token-drop'",
    }
    return dict(zip(commands, on_stub(*commands.values()), strict=True)), run


def test_no_kernel_is_replaced(together: Together) -> None:
    """A kernel that does not compile, or is wrong, costs a command one warning, not its exit code."""
    assert not {name: record["replaced"] for name, record in together[0].items() if record["replaced"]}


@pytest.fixture(scope="module")
def probed(together: Together) -> dict[str, Any]:
    """What probe.py has found out."""
    record = together[0]["probe"]
    assert record["outside"] == 0 and record["problems"] == []
    return json.loads(record["out"])


def assert_steps_are_recorded(made: Record, graphs: int) -> None:
    """Assert that whatever can be recorded is, with no launch beside the capture, and nothing in a capture waits."""
    assert [row["phase"] for row in json.loads(made["out"])["rows"]] == ["prefill", "decode", "train"]
    assert len(made["graphs"]) == graphs and min(made["graphs"]) > 10 and made["replays"] > graphs
    assert (made["outside"], made["refused"], made["problems"]) == (0, 0, [])


def test_a_bench_records_its_steps(together: Together) -> None:
    # two prompts and a step, of student and dense model; in training the teacher
    assert_steps_are_recorded(together[0]["bench"], 7)


@pytest.mark.slow
def test_a_bench_of_a_vision_language_model_records_its_steps(on_stub: RunOnStub) -> None:
    (made,) = on_stub(f"{BENCH} --batch 2 --model tiny-vlm --new-tokens 3", STUB_CAPABILITY="8")
    assert_steps_are_recorded(made, 6)  # and two for each one's prompt


def test_a_block_launches_what_is_said(probed: dict[str, Any]) -> None:
    """A block of a recorded decoding step has the launches that students/README.md gives."""
    assert (probed["routed 1"], probed["open 1"]) == (7, 7)
    assert probed["routed 17"] == 11
    assert probed["tokens 1"] == 19


def test_a_capture_refuses_to_wait(probed: dict[str, Any]) -> None:
    """The stub refuses what CUDA refuses, and the next capture is sound."""
    for work in ("item", "nonzero", "synchronize"):
        assert "CUDA error: operation" in probed[work], work
    assert probed["allowed"] == probed["after"] == ""


def test_a_mask_has_its_gradient(probed: dict[str, Any]) -> None:
    """Of image tokens routers learn through the mask of attention."""
    assert probed["mask"]


def assert_tests_hold(made: Record) -> None:
    """Assert that tests marked gpu pass: replays say what the model says, wherever the dial is."""
    assert " passed" in made["out"] and "skipped" not in made["out"]
    assert (made["outside"], made["problems"]) == (0, []) and made["replays"] > 10
    assert {"_gather", "_exact_rows", "_decode_attention", "_gated_rows"} <= set(made["kernels"])


def test_what_needs_a_gpu_holds(together: Together) -> None:
    assert_tests_hold(together[0]["tests"])


@pytest.mark.slow
def test_whatever_needs_a_gpu_holds(on_stub: RunOnStub) -> None:
    files = (f"tests/students/test_{name}.py" for name in RECORDINGS)
    (made,) = on_stub(" ".join([GPU_TESTS, *files]))
    assert_tests_hold(made)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [8, 9])
def test_compiled_kernels_do_what_references_do(capability: int, on_stub: RunOnStub) -> None:
    """Operators' tests that are marked gpu pass with kernels as they are compiled, each tensor an allocation."""
    apart = {"STUB_CAPABILITY": str(capability), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    where = "tests/students/kernels tests/losses -k 'not captured'"
    if capability == 9:
        where = where.replace("captured", "captured and not biased")  # whose products ptx.py does not know (wgmma)
    (made,) = on_stub(f"{GPU_TESTS} {where}", **apart)
    assert " passed" in made["out"] and "skipped" not in made["out"] and made["problems"] == []
    assert len(made["kernels"]) > 20


def test_a_run_is_that_of_a_cpu(
    together: Together, training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training two steps and generating give the compute and the text of the same commands on the CPU."""
    (records, there), here = together, tmp_path / "cpu"
    assert main(["distill", *training, "--output", str(here)]) == 0
    capsys.readouterr()
    assert main(["generate", str(here), *PROMPT]) == 0
    text = capsys.readouterr().out
    trained, generated = records["distill"], records["generate"]
    assert generated["out"] == text and generated["graphs"] and trained["launches"] > 1000
    assert len(trained["graphs"]) == 1 and trained["replays"] == 2  # the teacher's pass, in each step
    assert trained["outside"] == generated["outside"] == 0 and trained["problems"] == generated["problems"] == []
    made, expected = (json.loads((run / "elastic.json").read_text())["result"] for run in (there, here))
    for name in ("compute", "compute_prefill", "kl"):
        assert made[name] == pytest.approx(expected[name], rel=1e-3), name
