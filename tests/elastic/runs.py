"""Tiny runs: functions that configure, make and interrupt them, and assertions on their results."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from elastic import trainer
from elastic.config import RunConfig, make_config
from elastic.families import language
from elastic.run import Run, load
from students.checkpoint import read_tensors

Configure = Callable[..., RunConfig]
FEW_STEPS = [
    *("train.batch=4", "train.steps=4", "train.precision=float32"),
    *("train.log_every=1", "train.save_every=2", "train.warmup=2"),
]
"""Training settings of tiny runs of image models and vision-language models."""
FINISHED = ["checkpoint.safetensors", "config.yaml", "elastic.json", "metrics.jsonl", "routers.safetensors"]
"""Names of the files in the folder of a finished run, sorted."""


def as_options(settings: Sequence[str]) -> list[str]:
    """Return settings of the form "a.b=c" as options of the command line."""
    return [part for setting in settings for part in ("--set", setting)]


def silent(*_: object) -> None:
    """Discard the messages of a run (an argument for `say`)."""


def configurations(defaults: Sequence[str], **given: object) -> Configure:
    """Return a function make(*settings, **flags) that adds its arguments to the given ones and makes a configuration.

    Settings have the form "a.b=c"; flags are keyword arguments of `make_config`."""

    def make(*settings: str, **flags: object) -> RunConfig:
        return make_config(settings=[*defaults, *settings], **{**given, **flags})

    return make


def write_images(folder: Path, train: int, val: int) -> list[Path]:
    """Write random images of two classes, so many of each to train on and for validation; return their paths."""
    draw, paths = torch.Generator().manual_seed(0), []
    for part, images in (("train", train), ("val", val)):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for number in range(images):
                pixels = torch.randint(0, 255, (16, 16, 3), generator=draw, dtype=torch.uint8)
                paths.append(folder / part / name / f"{number}.png")
                Image.fromarray(pixels.numpy()).save(paths[-1])
    return paths


def distill(config: RunConfig, folder: Path, **options: object) -> dict:
    return trainer.distill(config, folder, say=silent, **options)


def resume(folder: Path) -> dict:
    return trainer.resume(folder, say=silent)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def metrics(folder: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl, without the entry that depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "steps_per_second"} for line in lines]


def assert_same_run(first: Path, second: Path) -> None:
    for name in ("checkpoint.safetensors", "routers.safetensors"):
        (a, about_a), (b, about_b) = (read_tensors(folder / name) for folder in (first, second))
        assert about_a == about_b and a.keys() == b.keys()
        assert not [key for key in a if not torch.equal(a[key], b[key])]
    assert metrics(first) == metrics(second)


def assert_only_routers_learned(folder: Path) -> None:
    """Assert that a run saved nothing but routers, and that the student's frozen weights equal the teacher's."""
    student = load(folder)
    base = {n.replace(".base_layer", ""): p for n, p in student.model.named_parameters() if not p.requires_grad}
    before = dict(Run.open(folder).teacher().model.named_parameters())
    assert base.keys() == before.keys() and all(torch.equal(base[name], before[name]) for name in base)
    assert all("routers" in name for name in student.added_state())


def on_step(
    patch: pytest.MonkeyPatch,
    step: int,
    change: Callable[[torch.Tensor], torch.Tensor],
    family: ModuleType = language,
) -> None:
    """Pass the loss of one training step (without accumulation) through `change`."""
    forward, calls = family.Distillation.forward, count(1)

    def patched(self: torch.nn.Module, *args: object) -> tuple:
        loss, measured = forward(self, *args)
        return (change(loss) if self.training and next(calls) == step else loss), measured

    patch.setattr(family.Distillation, "forward", patched)


def interrupt(value: object = None, *_: object) -> object:
    """Send SIGINT to this process, as Ctrl-C does, and return `value`, so that it can stand in for a callback."""
    os.kill(os.getpid(), signal.SIGINT)
    return value


def assert_stopping_changes_nothing(finished: Path, config: RunConfig, folder: Path, family: ModuleType) -> None:
    """Assert that a run that breaks off in step 4, its last, and is resumed, ends bit for bit like the finished one."""

    def stop(loss: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_step(patch, 4, stop, family)
        distill(config, folder)
    resume(folder)
    assert_same_run(finished, folder)
