"""Several processes learn what a single process learns, from the same images or questions about images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.elastic.runs import Configure
from tests.elastic.several import FORKED, SPREAD, assert_close, in_processes, one_and_two

pytestmark = pytest.mark.thorough

TOKENS = "student.routers=[{kind: token, sites: [attn, mlp]}, {kind: image}]"
TOWERS = "student.routers=[{kind: token, sites: [mlp], part: vision, kv: drop}, {kind: image, selection: quota}]"
RUNS: dict[str, dict[str, tuple[tuple[str, ...], dict[str, Any]]]] = {
    "images": {
        "merging": (("train.batch=3",), {}),
        "range": (("train.batch=5", "loss.hidden_weight=0.5"), {"budget__target": "0.75:1.0"}),
        "topk": (
            ("loss.hidden_weight=0.5", "loss.hidden_layers=all"),
            {"preset": "elastiformer", "budget__target": 0.85},
        ),
    },
    "questions": {
        "price": (("train.batch=5", "loss.hidden_weight=0.5"), {}),
        "range": ((), {"budget__target": "0.6:1.0"}),
        "hinge": (("budget.control=capacity", TOKENS), {"budget__target": 0.8}),
        "quota": (("train.batch=3", TOWERS), {"budget__target": 0.8}),
    },
}
"""Settings of runs by name, for each kind of data."""


def made(of: str, configure: Configure, folder: Path) -> Path:
    """Make the runs in RUNS[of] in a folder, by one process and by two, and one by two that shard the weights."""
    configs = {name: configure(*settings, **flags) for name, (settings, flags) in RUNS[of].items()}
    one_and_two(configs, folder)
    spread = "merging" if of == "images" else "quota"
    in_processes(2, {folder / "spread": configs[spread]}, folder, launcher=FORKED, **SPREAD)
    return folder


@pytest.fixture(scope="module")
def runs_images(configure_images: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("images", configure_images, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def runs_questions(configure_questions: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("questions", configure_questions, tmp_path_factory.mktemp("questions"))


@pytest.fixture
def runs(of: str, request: pytest.FixtureRequest) -> Path:
    """The folder of the runs in RUNS[of]. (A parametrized fixture of the module would make them for each test.)"""
    return request.getfixturevalue(f"runs_{of}")


@pytest.mark.parametrize(("of", "name"), [(of, name) for of in RUNS for name in RUNS[of]])
def test_two_processes_learn_what_one_does(name: str, runs: Path):
    assert_close(runs / f"one-{name}", runs / f"two-{name}")


@pytest.mark.parametrize(("of", "name"), [("images", "merging"), ("questions", "quota")])
def test_two_processes_with_parts_of_the_weights_learn_the_same(name: str, runs: Path):
    assert_close(runs / f"one-{name}", runs / "spread")
