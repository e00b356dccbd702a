"""Decode steps that CPUs record as lists of calls give the bits of the modules' own steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from students import LoraSpec, RouterSpec, StudentSpec
from students.kernels import replay as replaying
from students.kernels.choice import either
from students.kernels.replay import Replay
from students.recording.decoding import Decoding
from tests.backends import running_on
from tests.pico.language import TINY, make_tiny
from tests.students.test_decoding import CLOSE, SIX, SIX_LOGITS, student_for
from tests.students.test_gated_steps import CASES, ROUTERS, generated

SPEC = StudentSpec(
    (RouterSpec("mixture", optional=True), RouterSpec("channel"), RouterSpec("vocab", rank=5)), LoraSpec(2)
)
RECORDED = 3
"""The number of the run that is recorded, set low for these tests, which make few runs."""


@pytest.fixture(autouse=True, scope="module")
def in_c(library: object) -> Iterator[None]:
    with running_on("c", library), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(replaying, "RECORDED", RECORDED)
        yield


def replays(decoding: Decoding) -> list[Replay]:
    """Return the decode steps that have been recorded."""
    return [replay for _, replay in decoding._steps.values() if isinstance(replay, Replay) and replay.recorded]


@pytest.mark.parametrize(
    ("name", "rows"),
    [*((name, 1) for name in sorted(TINY)), ("llama", 2), ("gpt2", 2), ("qwen3_moe", 1), ("gpt_oss", 2)],
)
def test_tokens_and_bits(name: str, rows: int, tokens: Tensor) -> None:
    """Recorded generation gives the model's tokens, and a replayed step the bits of the modules' step."""
    student, dense = student_for(name, SPEC), make_tiny(name)
    for model, decoding in ((student.model, student._decoding), (dense, Decoding(dense, dense.base_model))):
        found, expected = (work(tokens[:rows], **SIX_LOGITS) for work in (decoding.generate, model.generate))
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)
        (step, replay), made = next(iter(decoding._steps.values())), []
        assert isinstance(replay, Replay) and replay.recorded
        for run in (replay, step.run, replay):
            step.slot.fill_(17)
            step.positions.fill_(17)
            made.append(run().clone())
        assert torch.equal(made[0], made[1]) and torch.equal(made[1], made[2])


def test_the_dial_threads_and_inference_mode(tokens: Tensor) -> None:
    student, one = student_for(spec=SPEC), tokens[:1]
    student.generate(one, **SIX)
    for offset in (1.0, -1.0):
        student.runtime.offset = offset
        with torch.inference_mode():
            found = student.generate(one, **SIX_LOGITS)
        torch.set_num_threads(2 if offset > 0 else 1)
        expected = student.model.generate(one, **SIX_LOGITS)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)
    assert len(replays(student._decoding)) == 1


def test_modules_run_where_somebody_watches(tokens: Tensor) -> None:
    """Steps run as modules while FLOPs are counted or a hook is registered, for many rows, and as the teacher."""
    student, calls = student_for(spec=SPEC), []
    with FlopCounterMode(display=False) as counter:
        student.generate(tokens, **SIX)
    assert counter.get_total_flops() > 0
    with student.model.get_submodule("model.layers.0.mlp").register_forward_hook(lambda *given: calls.append(given)):
        student.generate(tokens, **SIX)
    assert len(calls) == 6
    student.generate(tokens.repeat(4, 1), **SIX)
    student.runtime.bypass = True
    assert torch.equal(student.generate(tokens, **SIX), student.model.generate(tokens, **SIX))
    assert not student._decoding._steps


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1].startswith(("token", "layer"))])
def test_a_closed_token_is_left_out(name: str, kind: str, tokens: Tensor) -> None:
    """Recorded steps that choose between two lists of calls give the model's tokens, whatever the dial leaves open."""
    student, seen = student_for(name, ROUTERS[kind]), []
    rows = 1 if "drop" in kind else 2  # together, their gates are masks
    for offset in (-0.5, 1.5):
        student.runtime.offset = offset
        seen.append(generated(student, {"input_ids": tokens[:1]})[1])
        generated(student, {"input_ids": tokens[:rows]})
    assert len(replays(student._decoding)) >= rows and not torch.equal(*seen)


def test_what_depends_on_data_is_decoded_without_a_word(tokens: Tensor, recwarn: pytest.WarningsRecorder) -> None:
    for kind in ("expert", "head"):
        student = student_for(spec=StudentSpec((RouterSpec(kind),)))
        assert torch.equal(*(model.generate(tokens, **SIX) for model in (student, student.model)))
        assert not replays(student._decoding)
    assert not recwarn.list
    replay = Replay(tokens.nonzero)
    assert all(torch.equal(replay(), tokens.nonzero()) for _ in range(RECORDED + 1)) and not replay.recorded


@pytest.mark.parametrize("recorded", [True, False])
def test_both_ways_find_what_was_there_before(recorded: bool) -> None:
    """What only one of two functions needs may be overwritten by the other, of which a replay runs one."""
    x, condition = torch.randn(64), torch.tensor([recorded])

    def work() -> Tensor:
        only = [x * 2]
        return either(condition, lambda: (only.pop() + 1).exp() * x, lambda: (x - 1).sin() + x.cos()) / 2

    replay = Replay(work)
    for _ in range(RECORDED):
        replay()
    for now in (recorded, not recorded, recorded):
        condition.fill_(now)
        x.normal_()
        assert torch.equal(replay(), ((x * 2 + 1).exp() * x if now else (x - 1).sin() + x.cos()) / 2)
    assert replay.recorded


def test_what_cannot_be_recorded_advances_a_state_once() -> None:
    state, tokens = torch.zeros(4), torch.arange(4)

    def work() -> Tensor:
        torch.add(state, 1, out=state)
        return tokens.masked_select(state.mul_(2) > 1)

    replay = Replay(work)
    for run in range(1, RECORDED + 2):
        assert torch.equal(replay(), tokens) and not replay.recorded
        assert state[0] == 2 ** (run + 1) - 2


def test_operators_of_every_sort_run_again() -> None:
    x, y = torch.randn(3, 4), torch.zeros(4)

    def work() -> Any:
        y.add_(1)
        first, second = (x * y).split(2, 1)
        values, places = x.sort(dim=1)
        return first.contiguous() @ second.mT, values, places, torch.zeros(3).masked_fill_(x[:, 0] > 0, 2.0)

    replay = Replay(work)
    for _ in range(RECORDED):
        replay()
    x.normal_()
    found = [part.clone() for part in replay()]
    assert replay.recorded and y[0] == RECORDED + 1
    y.sub_(1)
    assert all(map(torch.equal, found, work()))


def test_results_that_nobody_needs_share_memory() -> None:
    x = torch.randn(100)

    def work() -> list[Tensor]:
        kept, part = [x + 1], x
        for _ in range(8):
            part = (part.view(10, 10) @ x.view(10, 10)).softmax(1).flatten()
        kept[0][0] = 7.0
        return [*kept, part.to(torch.bfloat16), part[3:5]]

    replay = Replay(work)
    for _ in range(RECORDED):
        replay()
    x.normal_()
    assert all(map(torch.equal, replay(), work())) and len(replay._blocks._blocks) <= 6
