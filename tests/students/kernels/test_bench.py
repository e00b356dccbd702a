"""The tables of kernels' speeds are made; what stands in them only a GPU can tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from students.kernels import triton
from tests import interpreter


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch):
    """The benchmark on a CPU, tiny; a call takes a microsecond."""
    if not triton.available() or torch.cuda.is_available():
        pytest.skip("Triton is not installed, or runs on a GPU")
    from students.kernels.triton import bench

    def run(calls: Sequence[Callable[[], object]], replays: int = 0) -> float:
        calls[0]()
        return 1.0

    interpreter.mend(monkeypatch)
    for name, value in {
        "DEVICE": torch.device("cpu"),
        "SHAPES": {"narrow": (64, 96)},
        "MORE_SHAPES": {},
        "CACHE": 0,
        "LOGITS": (2, 90),
        "TOKENS": (3, 40),
        "IMAGES": ((1, 9, 8),),
        "microseconds": run,
    }.items():
        monkeypatch.setattr(bench, name, value)
    return bench


def test_it_prints_tables_and_lines_for_the_table_of_launches(timed):
    header, _, one, four = timed.gather_lines(torch.bfloat16, [1, 4])
    assert {line.count("|") for line in (header, one, four)} == {14}
    assert one.startswith("| 64x96 | 1 | 1.0 |")
    assert all(line.count("|") == 5 for line in timed.other_lines(torch.float32))
    first, *lines, last = timed.tune(torch.bfloat16)
    assert (first, last) == ("90: {", "},")
    assert [line.split("Gather(")[0].strip() for line in lines] == ["('one', 'narrow'):", "('few', 'narrow'):"]
