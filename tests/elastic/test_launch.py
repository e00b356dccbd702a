"""Several processes, started by torchrun, learn what one does from the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic.config import RunConfig
from tests.elastic.several import assert_close, one_and_two

Configure = Callable[..., RunConfig]
LANGUAGE: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "price": (("student.lora.rank=4", "train.batch=3"), {}),
    "accumulation": (("train.accumulation=2", "loss.hidden_weight=0.5", "loss.hidden_layers=all"), {}),
    "range": (("train.batch=4",), {"budget__target": "0.6:1.0"}),
    "hinge": (("train.batch=3",), {"preset": "router-tuning"}),
    "topk": ((), {"preset": "elastiformer", "budget__target": 0.85}),
    "sequence": (("data.prompt=4", "student.routers=[{kind: head, granularity: sequence}]"), {"budget__target": 0.95}),
}
"""Settings of runs of language models, of all kinds of terms in a loss."""


@pytest.fixture(scope="module")
def runs(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    configs = {name: configure(*settings, **flags) for name, (settings, flags) in LANGUAGE.items()}
    return one_and_two(configs, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", LANGUAGE)
def test_two_processes_learn_what_one_does_of_text(name: str, runs: Path):
    assert_close(runs / f"one-{name}", runs / f"two-{name}")
