"""Data-parallel runs: functions that launch several processes, the work of each process, and assertions on the results.

Run with `python -m`, this module is one of the processes. Its argument is a .jsonl file that lists runs, one a line:
`[folder, configuration, teacher cache or null]`, or `[folder, null, null]` to resume a run; other arguments are a
command line of Elastic. The environment variable FAILS names the rank that fails, its batch, and how it fails:
"1:3:refuses" (reading the batch raises), "1:3:raises" (the forward pass raises) or "1:3:dies" (the process exits).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from elastic import cli, launch, trainer
from elastic.config import RunConfig
from elastic.families import language
from elastic.run import Run
from elastic.settings import from_dict, to_dict
from students.checkpoint import read_tensors
from tests.elastic.forked import forked

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
"""The command of torchrun; like those of accelerate below, to be followed by the number of processes."""
ACCELERATE, FSDP2 = (
    (
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", ROOT / f"configs/accelerate/{name}.yaml", "--num_processes"),
    )
    for name in ("one-machine", "fsdp2")
)
FORKED: Sequence[object] = ("forked",)
"""The launcher of forked.py, faster than the real ones, for tests that do not depend on which launcher is used."""
SPREAD = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""Environment variables by which accelerate asks for FSDP2, that is, for sharded weights."""
LEARNED = dict(rtol=1e-3, atol=2e-5)
"""Tolerances for learned parameters, because more processes sum gradients in another order."""


def launched(
    count: int, *arguments: object, launcher: Sequence[object] = TORCHRUN, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run this module with the arguments in `count` processes on CPUs; variables: added to the environment."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    environment = {**os.environ, **settings, **variables}
    if launcher is FORKED:
        return forked(count, [str(argument) for argument in arguments], environment, ROOT)
    command = [*map(str, launcher), str(count), "-m", "tests.elastic.several", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    try:
        out, err = started.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        started.terminate()  # the launcher then ends its worker processes
        out, err = started.communicate()
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def in_processes(
    count: int,
    runs: dict[Path, RunConfig | None],
    list_in: Path,
    caches: Mapping[Path, Path] = MappingProxyType({}),
    launcher: Sequence[object] = TORCHRUN,
    **variables: str,
) -> None:
    """Make the runs in `count` processes, and resume those whose configuration is None.

    list_in: the folder for the file that lists the runs. caches: teacher caches, by run folder."""
    file = list_in / f"runs-{len(list(list_in.iterdir()))}.jsonl"
    known = {folder: str(cache) for folder, cache in caches.items()}
    lines = [
        json.dumps([str(folder), config and to_dict(config), known.get(folder)]) for folder, config in runs.items()
    ]
    file.write_text("\n".join(lines))
    done = launched(count, file, launcher=launcher, **variables)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(one: Path, other: Path) -> None:
    """Assert that two runs have the same steps, parameters, dial and results, up to rounding."""
    for name in ("checkpoint.safetensors", "routers.safetensors"):
        (a, about_a), (b, about_b) = (read_tensors(folder / name) for folder in (one, other))
        assert about_a.keys() == about_b.keys() and about_a.get("span") == about_b.get("span")
        assert math.isclose(about_a.get("offset", 0), about_b.get("offset", 0), abs_tol=1e-3)
        assert {key: (x.shape, x.dtype) for key, x in a.items()} == {key: (x.shape, x.dtype) for key, x in b.items()}
        for key in a:
            torch.testing.assert_close(a[key], b[key], **LEARNED, msg=lambda text, key=key: f"{key}: {text}")
    first, second = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, other)
    )
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for a, b in zip(first, second, strict=True):
        for key in set(a) - {"steps_per_second", "budgets"}:
            assert math.isclose(a[key], b[key], rel_tol=1e-3, abs_tol=1e-5), (a["step"], key, a[key], b[key])
    rows = [Run.open(folder).about["results"] for folder in (one, other)]
    assert len(rows[0]) == len(rows[1])
    for a, b in zip(*rows, strict=True):
        assert set(a) == set(b)
        for key in set(a) - {"checkpoint_bytes"}:  # it counts the dial's points and digits; tensors are compared above
            value = a[key]
            same = math.isclose(value, b[key], rel_tol=0.01) if isinstance(value, float) else value == b[key]
            assert same or "per_second" in key, (key, value, b[key])


def one_and_two(
    configs: dict[str, RunConfig],
    folder: Path,
    caches: Mapping[str, str] = MappingProxyType({}),
    launcher: Sequence[object] = FORKED,
) -> Path:
    """Make each run in `folder` by one process ("one-NAME") and by two ("two-NAME"), and return `folder`.

    caches: the names of teacher caches in `folder`, by name of the run ("two-NAME").
    """
    kept = {folder / name: folder / cache for name, cache in caches.items()}
    for name, config in configs.items():
        run = folder / f"one-{name}"
        trainer.distill(config, run, teacher_cache=kept.get(run), say=lambda _: None)
    in_processes(2, {folder / f"two-{name}": config for name, config in configs.items()}, folder, kept, launcher)
    return folder


def _fail(rank: str, batch: str, how: str) -> None:
    """If this process has the given rank, make it fail at the given batch (counted from 1); `how`: see the module."""
    if os.environ["RANK"] != rank:
        return
    place, name = (language.Batches, "read") if how == "refuses" else (language.Distillation, "forward")
    work, calls = getattr(place, name), itertools.count(1)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == int(batch):
            if how == "dies":
                os._exit(9)
            raise ValueError("the batch is odd")
        return work(*args, **kwargs)

    setattr(place, name, failing)


def _main(runs: Path) -> None:
    launch.join()
    for line in runs.read_text(encoding="utf-8").splitlines():
        folder, config, cache = json.loads(line)
        if config is None:
            trainer.resume(folder, say=lambda _: None)
        else:
            trainer.distill(from_dict(RunConfig, config), folder, teacher_cache=cache, say=lambda _: None)
    launch.leave()


def work() -> int | None:
    """Do the work of one process, and return its exit code (None: success)."""
    if "FAILS" in os.environ:
        _fail(*os.environ["FAILS"].split(":"))
    return _main(Path(sys.argv[1])) if sys.argv[1].endswith(".jsonl") else cli.main()


if __name__ == "__main__":
    sys.exit(work())
