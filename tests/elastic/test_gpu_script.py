"""The script for machines with a GPU: the commands that it lists are valid, and what its table shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

from elastic.cli import main
from elastic.cli.parser import parser
from elastic.shape_config import shape_config

CI = Path(__file__).parent.parent.parent / ".ci"
COMMANDS = [
    line.split(maxsplit=1)
    for line in (CI / "gpu-bench").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]


def script(name: str) -> ModuleType:
    spec = spec_from_file_location(name, CI / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table() -> ModuleType:
    return script("gpu_table")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_gpu_it_says_so() -> None:
    command = ["bash", str(CI / "gpu")]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"no GPU") and done.stderr.count(b"\n") == 1


FAKES = {
    "python": """case "$*" in
        *is_available*) exit 0 ;;
        *pytest*) echo "ran $*"; case "$*" in *1/5) exit 1 ;; *3/5) exit 5 ;; esac ;;
        *kernels.bench*) echo "| kernels |" ;;
        *gpu_commands.py*) echo "{}" >"$2/1-tokens,keep.json"; [ "$3" -gt 300 ] ;;
        *gpu_table.py*) echo "| table of ${2##*/} |" ;;
    esac""",
    "timeout": """while [ "$1" != "${1#-}" ]; do shift 2; done
    shift
    case "$*" in *5/5) exit 124 ;; *) exec "$@" ;; esac""",
    "nproc": "echo 7",  # three in four of these run tests: 5
}
"""Programs that stand in for an interpreter on a machine with a GPU, whose first tests fail and whose last take too
long, for the command that ends these, and for the number of cores."""


def test_all_is_run_whatever_fails(tmp_path: Path) -> None:
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(CI / "gpu")], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("ran")] == [
        f"{part}/5" for part in (1, 2, 3, 4)
    ]
    assert done.stdout.splitlines()[-2:] == ["| kernels |", "| table of 1-tokens,keep.json |"]
    assert "part 5/5 ran out of its 120 seconds" in done.stderr and done.stderr.count("ran out") == 1


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_every_command_is_one(name: str, line: str) -> None:
    options = parser().parse_args(["bench", *shlex.split(line)])
    assert options.random_weights and "-" not in name
    config = shape_config(
        options.model, preset=options.preset, settings=options.set, budget__target=options.target_compute
    )
    assert config.student.routers


@pytest.mark.thorough
def test_a_table_of_what_was_timed(table: ModuleType, tmp_path: Path) -> None:
    quick = "--random-weights --repeats 1 --set train.batch=1"
    (tmp_path / "gpu-bench").write_text(
        f"# of tiny shapes\n\nmerging --model tiny-vit --preset static --batch 2 {quick}\nnone --model huge {quick}\n"
        f"layers,drop --model tiny-llm --tokens 16 --new-tokens 2 {quick}\n"
    )
    copied = shutil.copy(CI / "gpu_commands.py", tmp_path)
    command = [sys.executable, copied, tmp_path, "1000"]
    environment = {**os.environ, "PYTHONPATH": str(CI.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no shape is called 'huge'" in done.stderr and re.search(
        r"failed after \d+ seconds: elastic bench --model huge", done.stderr
    )
    assert {file.name for file in tmp_path.glob("*.json")} == {"1-merging.json", "3-layers,drop.json"}
    (tmp_path / "10-merging.json").write_text("what a library prints\n" + (tmp_path / "1-merging.json").read_text())
    (tmp_path / "1-merging.json").unlink()
    *found, gap, missing = table.lines(list(tmp_path.glob("[0-9]*-*")))
    assert gap == "" and re.match(r"failed after \d+ seconds: elastic bench --model huge", missing)
    assert f"torch {torch.__version__}" in found[0] and found[1] == ""
    assert {line.count("|") for line in found[2:]} == {len(table.COLUMNS) + 1}
    reached = {line.split("|")[1 + table.COLUMNS.index("of predicted")].strip() for line in found[4:]}
    assert any(reached) and all(re.fullmatch(r"\d+\.\d\d", share) for share in reached if share)
    works = [" ".join(line.split("|")[1:3]).split() for line in found[4:]]
    assert [" ".join(work) for work in works] == [
        "tiny-llm, layers, drop, 0.7 prefill 1 x 16",  # no row for decoding: two new tokens are too few
        *("tiny-llm, layers, drop, 0.7 train 1 x 256", "tiny-vit, merging, 0.7 classify 2 x 65"),
        "tiny-vit, merging, 0.7 train 1 x 65",
    ]
    assert table.lines([]) == ["nothing was timed"]


def test_a_command_that_is_stopped_writes_what_it_has_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = script("gpu_commands")

    def becomes(arguments: list[str], out: Path) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which pytest-xdist's processes ignore
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            out.write_text("rows")
            os._exit(130)

    monkeypatch.setattr(commands, "_become", becomes)
    assert commands.run([], tmp_path / "out", commands.GRACE + 0.3) is None
    assert (tmp_path / "out").read_text() == "rows"


def test_a_table_names_what_there_was_no_time_for(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = script("gpu_commands")
    monkeypatch.setattr(commands, "IMPORTED", ())
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["gpu_commands.py", str(tmp_path), "10"])
    assert commands.main() == 0
    found = table.lines(list(tmp_path.glob("[0-9]*-*")))
    missing = [f"out of time, not run: elastic bench {shlex.join(shlex.split(line))}" for _, line in COMMANDS]
    assert found == ["nothing was timed", *(part for line in missing for part in ("", line))]


def test_a_table_names_kernels_that_were_replaced(table: ModuleType, tmp_path: Path) -> None:
    versions = dict.fromkeys(("torch", "transformers", "elastic-distill"), "1")
    machine = {"device": "a GPU", "processor": "a CPU"}
    row = {"phase": "classify", "batch": 1, "tokens": 65, "dtype": "bfloat16", "compute_target": 0.7, "compute": 0.7}
    row |= {"predicted_speedup": 1.4, "measured_speedup": 1.2, "dense_seconds": 2.0, "seconds": 1.0, "peak_bytes": 1e9}
    made = {"date": "today", "timed": "tiny-vit, random weights", "versions": versions, "rows": [row]}
    for number, more in enumerate(({}, {"replaced_kernels": "merge_lowest, rotary"}), 1):
        (tmp_path / f"{number}-merging.json").write_text(json.dumps(made | {"machine": machine | more}))
    found = table.lines(list(tmp_path.glob("*.json")))
    assert found[-2:] == ["", "2-merging: torch's operators in place of merge_lowest, rotary"] and len(found) == 8


@pytest.mark.thorough
def test_rows_say_what_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    command = "bench --model tiny-llm --random-weights --target-compute 0.8 --compute 0.8 1.0 --tokens 8 --new-tokens 2"
    assert main([*command.split(), "--repeats", "1", "--json", "--set", "train.batch=1"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["compute_target"] for row in rows] == [0.8, 0.8, 1.0, 1.0, 0.8]
