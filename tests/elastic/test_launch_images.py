"""Several processes learn what one does from the same images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic.config import RunConfig
from tests.elastic.several import FORKED, SPREAD, assert_close, in_processes, one_and_two
from tests.elastic.test_image_runs import configure, image_folder, timm_folder  # noqa: F401

IMAGES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "merging": ((), {}),
    "range": (("train.batch=5", "loss.hidden_weight=0.5"), {"budget__target": "0.75:1.0"}),
    "topk": (("loss.hidden_weight=0.5", "loss.hidden_layers=all"), {"preset": "elastiformer", "budget__target": 0.85}),
    "hinge": (("train.batch=3",), {"preset": "router-tuning"}),
}
"""Settings of runs of image models."""


@pytest.fixture(scope="module")
def runs(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    configs = {name: configure(*settings, **flags) for name, (settings, flags) in IMAGES.items()}
    return one_and_two(configs, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", IMAGES)
def test_two_processes_learn_what_one_does_of_images(name: str, runs: Path):
    assert_close(runs / f"one-{name}", runs / f"two-{name}")


def test_two_processes_with_parts_of_the_weights_learn_the_same(
    configure: Callable[..., RunConfig],  # noqa: F811
    runs: Path,
    tmp_path: Path,
):
    settings, flags = IMAGES["merging"]
    in_processes(2, {tmp_path / "parts": configure(*settings, **flags)}, tmp_path, launcher=FORKED, **SPREAD)
    assert_close(runs / "one-merging", tmp_path / "parts")
