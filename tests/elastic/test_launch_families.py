"""Several processes learn what a single process learns, from the same images or questions about images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.elastic.several import FORKED, SPREAD, assert_close, in_processes, one_and_two

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


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs in RUNS[param], by one process and by two, and of one by two that shard the weights."""
    configure, folder = request.getfixturevalue(f"configure_{request.param}"), tmp_path_factory.mktemp("runs")
    configs = {name: configure(*settings, **flags) for name, (settings, flags) in RUNS[request.param].items()}
    one_and_two(configs, folder)
    spread = "merging" if request.param == "images" else "quota"
    in_processes(2, {folder / "spread": configs[spread]}, folder, launcher=FORKED, **SPREAD)
    return folder


@pytest.mark.parametrize(("runs", "name"), [(of, name) for of in RUNS for name in RUNS[of]], indirect=["runs"])
def test_two_processes_learn_what_one_does(name: str, runs: Path):
    assert_close(runs / f"one-{name}", runs / f"two-{name}")


@pytest.mark.parametrize(("runs", "name"), [("images", "merging"), ("questions", "quota")], indirect=["runs"])
def test_two_processes_with_parts_of_the_weights_learn_the_same(name: str, runs: Path):
    assert_close(runs / f"one-{name}", runs / "spread")
