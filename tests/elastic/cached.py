"""Assertions on runs that store the teacher's outputs in a cache or read them from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from elastic import families, trainer
from elastic.run import Run
from students.checkpoint import read_tensors


def assert_learned(one: Path, other: Path, **how: float) -> None:
    """Assert that the routers and optimizers of two runs agree within the tolerances `how`; by default, bit for bit."""
    (a, _), (b, _) = (read_tensors(folder / "checkpoint.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], **(how or {"rtol": 0, "atol": 0}))


def assert_a_cache_changes_nothing(without: Path, samples: int) -> list[str]:
    """Repeat a run's training twice, once filling a teacher cache and once reading it, and assert that both learn the
    same; their dials are not set, and nothing is measured.

    without: the folder of the run, made without a cache. samples: the number of samples that the run trained on.
    Returns the lines about the cache that the two runs print."""
    config, cache, said = Run.open(without).config, without.parent / "cache", []
    objective = families.of(config.family).Distillation
    signals, asked = objective.teacher_signals, []

    def noted(self: Any, batch: Any) -> Any:
        asked.extend([len(batch)] if self.training else [])
        return signals(self, batch)

    unset, unmeasured = patch.object(trainer, "set_budget"), patch.object(trainer, "measure", return_value=[{}])
    with patch.object(objective, "teacher_signals", noted), unset, unmeasured:
        for name in ("fills", "reads"):
            trainer.distill(config, without.parent / name, teacher_cache=cache, say=said.append)
            assert_learned(without, without.parent / name)
            if name == "fills":
                assert 0 < sum(asked) <= samples  # fewer where samples are identical
                asked.clear()
    assert not asked
    about = Run.open(without.parent / "reads").about
    assert about["teacher_cache"] == {"folder": str(cache), "found": samples, "asked": 0}
    return [line.replace(str(cache), "") for line in said if line.startswith("teacher cache: ")]
