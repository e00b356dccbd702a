"""Tests of the tests' instruments: `NoHostWaits` notices waits for the device, and a `Tape` replays its work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from students.kernels.capture import Fetched
from tests.students.host_waits import HostWait, NoHostWaits
from tests.students.tape import Tape


def test_waits_are_noticed() -> None:
    x = torch.arange(4.0)
    for work in (
        *(lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: x.nonzero(), lambda: x[x > 1], lambda: x.unique()),
        *(lambda: x.masked_select(x > 1), lambda: x.tolist(), lambda: torch.equal(x, x), lambda: torch.tensor(1.0)),
        *(lambda: x.repeat_interleave(torch.ones(4, dtype=torch.long)), lambda: int(x.argmax())),
    ):
        with pytest.raises(HostWait), NoHostWaits():
            work()
    with NoHostWaits():
        x[x.long()], x.topk(2), x.masked_fill(x > 1, 0.0), torch.where(x > 1, x, 0.0), x.repeat_interleave(2)


def test_a_tape_does_again_what_was_done() -> None:
    x, total = torch.ones(3), torch.zeros(3)

    def work() -> Tensor:
        total.add_(x)
        return (total * 2).view(3, 1)[1:]

    replay = Tape(work)
    x.fill_(10.0)
    assert replay().flatten().tolist() == [24, 24] and replay().flatten().tolist() == [44, 44]


def test_what_is_fetched_arrives() -> None:
    assert Fetched(torch.arange(3)).wait().tolist() == [0, 1, 2]
