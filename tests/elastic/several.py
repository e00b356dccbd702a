"""Runs by several processes: how tests have a launcher start them, what each of them does, and what has to come out.

As a module this is what each process does: one run after the other, of a file with a line of JSON for each, `[folder,
configuration, teacher's cache or null]`, or `[folder, null, null]` for one that is to be continued; or a command line
of Elastic. FAILS says which process fails at which batch, and how: "1:3:refuses", "1:3:raises" or "1:3:dies".
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
"""Each of the launchers takes the number of processes next."""
ACCELERATE, FSDP2 = (
    (
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", ROOT / f"configs/accelerate/{name}.yaml", "--num_processes"),
    )
    for name in ("one-machine", "fsdp2")
)
FORKED: Sequence[object] = ("forked",)
"""Quicker than a real one, for what does not hang on it; see forked.py."""
SPREAD = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What FSDP2 is in the environment."""
LEARNED = dict(rtol=1e-3, atol=2e-5)
"""How far parameters may be apart, where sums are rounded in another order."""


def launched(
    count: int, *arguments: object, launcher: Sequence[object] = TORCHRUN, **variables: str
) -> subprocess.CompletedProcess[str]:
    """This module with arguments, in so many processes on CPUs."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    environment = {**os.environ, **settings, **variables}
    if launcher is FORKED:
        return forked(count, [str(argument) for argument in arguments], environment, ROOT)
    command = [*map(str, launcher), str(count), "-m", "tests.elastic.several", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    try:
        out, err = started.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        started.terminate()  # it ends those that it has started
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
    """Make these runs in so many processes, or continue those without a configuration; caches: of those that have one
    of what the teacher says."""
    file = list_in / f"runs-{len(list(list_in.iterdir()))}.jsonl"
    known = {folder: str(cache) for folder, cache in caches.items()}
    lines = [
        json.dumps([str(folder), config and to_dict(config), known.get(folder)]) for folder, config in runs.items()
    ]
    file.write_text("\n".join(lines))
    done = launched(count, file, launcher=launcher, **variables)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(one: Path, other: Path) -> None:
    """The same steps, parameters, dial and results, but for rounding."""
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
        for key, value in a.items():
            rounded = isinstance(value, float) or key == "checkpoint_bytes"  # in which the dial's decimals are counted
            same = math.isclose(value, b[key], rel_tol=0.01) if rounded else value == b[key]
            assert same or "per_second" in key, (key, value, b[key])


def one_and_two(
    configs: dict[str, RunConfig],
    folder: Path,
    caches: Mapping[str, str] = MappingProxyType({}),
    launcher: Sequence[object] = FORKED,
) -> Path:
    """The folder, with all of these runs in it, each made by one process ("one-...") and by two ("two-...").

    caches: the folders in it that some of them keep what the teacher says in.
    """
    kept = {folder / name: folder / cache for name, cache in caches.items()}
    for name, config in configs.items():
        run = folder / f"one-{name}"
        trainer.distill(config, run, teacher_cache=kept.get(run), say=lambda _: None)
    in_processes(2, {folder / f"two-{name}": config for name, config in configs.items()}, folder, kept, launcher)
    return folder


def _fail(rank: str, batch: str, how: str) -> None:
    """Let this process fail at a batch, if it is the one."""
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
    """What one of the processes does; returns its exit code."""
    torch.set_num_threads(1)
    if "FAILS" in os.environ:
        _fail(*os.environ["FAILS"].split(":"))
    return _main(Path(sys.argv[1])) if sys.argv[1].endswith(".jsonl") else cli.main()


if __name__ == "__main__":
    sys.exit(work())
