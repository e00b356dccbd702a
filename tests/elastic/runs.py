"""Tiny runs: their configurations, how they are made and stopped, and what has to come out of them."""

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
"""Settings of runs on images, or on questions about them."""
FINISHED = ["checkpoint.safetensors", "config.yaml", "elastic.json", "metrics.jsonl", "routers.safetensors"]
"""The files of a run that is."""


def silent(*_: object) -> None:
    """Where tests have a run say something that they do not read."""


def configurations(defaults: Sequence[str], **given: object) -> Configure:
    """make(*settings "a.b=c", **flags of make_config), on top of these settings and flags."""

    def make(*settings: str, **flags: object) -> RunConfig:
        return make_config(settings=[*defaults, *settings], **{**given, **flags})

    return make


def distill(config: RunConfig, folder: Path, **options: object) -> dict:
    return trainer.distill(config, folder, say=silent, **options)


def resume(folder: Path) -> dict:
    return trainer.resume(folder, say=silent)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics, but for what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "steps_per_second"} for line in lines]


def assert_same_run(first: Path, second: Path) -> None:
    for name in ("checkpoint.safetensors", "routers.safetensors"):
        (a, about_a), (b, about_b) = (read_tensors(folder / name) for folder in (first, second))
        assert about_a == about_b and a.keys() == b.keys()
        assert not [key for key in a if not torch.equal(a[key], b[key])]
    assert metrics(first) == metrics(second)


def assert_only_routers_learned(folder: Path) -> None:
    """A run saves routers alone, and leaves the teacher's weights as they were."""
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
    """What Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)
    return value


def assert_stopping_changes_nothing(finished: Path, config: RunConfig, folder: Path, family: ModuleType) -> None:
    """A run like the finished one that breaks off in its last step, and is continued, ends like it."""

    def stop(loss: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_step(patch, 4, stop, family)
        distill(config, folder)
    resume(folder)
    assert_same_run(finished, folder)
