"""Several processes learn what one does from the same questions about images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic.config import RunConfig
from tests.elastic.several import FORKED, SPREAD, assert_close, in_processes, one_and_two
from tests.elastic.test_vision_language_runs import configure, model_folder, questions  # noqa: F401

TOKENS = "student.routers=[{kind: token, sites: [attn, mlp]}, {kind: image}]"
TOWERS = "student.routers=[{kind: token, sites: [mlp], part: vision, kv: drop}, {kind: image, selection: quota}]"
QUESTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "price": (("train.batch=5", "loss.hidden_weight=0.5"), {}),
    "range": ((), {"budget__target": "0.6:1.0"}),
    "hinge": (("budget.control=capacity", TOKENS), {"budget__target": 0.8}),
    "quota": (("train.batch=3", TOWERS), {"budget__target": 0.8}),
}
"""Settings of runs of vision-language models."""


@pytest.fixture(scope="module")
def runs(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    configs = {name: configure(*settings, **flags) for name, (settings, flags) in QUESTIONS.items()}
    return one_and_two(configs, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", QUESTIONS)
def test_two_processes_learn_what_one_does_of_questions(name: str, runs: Path):
    assert_close(runs / f"one-{name}", runs / f"two-{name}")


def test_two_processes_with_parts_of_the_weights_learn_the_same(
    configure: Callable[..., RunConfig],  # noqa: F811
    runs: Path,
    tmp_path: Path,
):
    settings, flags = QUESTIONS["quota"]
    in_processes(2, {tmp_path / "parts": configure(*settings, **flags)}, tmp_path, launcher=FORKED, **SPREAD)
    assert_close(runs / "one-quota", tmp_path / "parts")
