"""The tables of kernels' speeds are printed in their form; the times in them are meaningful on an idle machine only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from students.kernels import bench, triton
from tests import interpreter

TINY = bench.Setup(
    torch.device("cpu"),
    weights=((64, 96),),
    head=(90, 40),
    logits=(2, 90),
    tokens=(3, 40),
    images=((1, 9, 8),),
    rows=(1, 4),
    beyond=0,
    replays=2,
)


@torch.no_grad()
def test_it_prints_tables():
    header, _, one, four = bench.channel_lines(TINY)
    assert {line.count("|") for line in (header, one, four)} == {14}
    assert one.startswith("| 64x96 | 1 | ")
    lines = list(bench.head_lines(TINY))
    assert [line.count("|") for line in lines] == [14, 14, 14, 14, 0, 8, 8, 8]
    assert all(line.count("|") == 5 for line in bench.other_lines(TINY))


def test_it_prints_lines_for_the_table_of_launches(monkeypatch: pytest.MonkeyPatch):
    if not triton.installed() or torch.cuda.is_available():
        pytest.skip("Triton is not installed, or runs on a GPU")
    from students.kernels.triton.tune import tune

    def once(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        calls[0]()
        return lambda: 1.0

    interpreter.mend(monkeypatch)
    monkeypatch.setattr(bench.Setup, "_timer", lambda self, calls: once(calls))
    first, *lines, last = tune(TINY)
    assert (first, last) == ("90: {", "},")
    assert [line.split("Gather(")[0].strip() for line in lines] == ["('one', 'narrow'):", "('few', 'narrow'):"]
