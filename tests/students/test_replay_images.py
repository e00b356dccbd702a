"""Passes over images that CPUs record as lists of calls give the bits of the modules' own passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from students.families.image import ImageStudent, call, recorded_pass
from students.kernels import capture
from students.kernels.replay import Replay
from tests.pico.image import MODELS, first
from tests.pico.vision_language import make_prompts
from tests.students.test_prompts import ALIKE, FOUR, WHOLE, same
from tests.students.test_recorded_images import student_for
from tests.students.test_replay import RECORDED
from tests.students.test_replay import in_c as in_c  # for all tests here
from tests.students.test_vision_language import PRUNING, student_of


def replays(student: Any) -> list[Replay]:
    """Return the passes over images that have been recorded."""
    return [replay for _, replay in student._recorded.kept.values() if replay.recorded]


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *((name, "block merges") for name in ("timm_fused", "timm_dinov3", "siglip")),
        ("timm_fused", "heads and experts"),
    ],
)
def test_bits(name: str, spec: str, pixels: Tensor) -> None:
    student = student_for(name, spec, pixels)
    for number, offset in enumerate((0.0, 0.4)):
        student.runtime.offset = offset
        kept = [student.predict(pixels) for _ in range(RECORDED + 1)]
        kept += [student.predict(pixels.flip(0)), student.predict(pixels)]
        expected = first(call(student.model, pixels))
        assert len(replays(student)) == number + 1
        assert all(torch.equal(first(out), expected) for out in (*kept[:-2], kept[-1])), "no result is overwritten"
        assert torch.equal(first(kept[-2]), first(call(student.model, pixels.flip(0))))
    with student.teacher():
        found = [first(student.predict(pixels)) for _ in range(RECORDED + 1)]
        assert all(torch.equal(out, first(call(student.model, pixels))) for out in found)


def test_what_runs_as_ever(pixels: Tensor, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is recorded over many tokens or where shapes depend on images, and no warning says so. A recorded pass
    runs as modules while operations are counted or a hook is registered."""
    student, calls = student_for("timm_fused", "block merges", pixels), []

    def again(student: ImageStudent) -> None:
        for _ in range(RECORDED):
            assert torch.equal(student.predict(pixels), call(student.model, pixels))

    with monkeypatch.context() as patch:
        patch.setattr(capture, "FEW", len(pixels) * student.tokens - 1)
        again(student)
        assert not student._recorded.kept
    again(student)
    assert replays(student)
    with FlopCounterMode(display=False) as counter:
        student.predict(pixels)
    assert counter.get_total_flops() > 0
    with student.blocks[0].register_forward_hook(lambda *given: calls.append(given)):
        student.predict(pixels)
    assert len(calls) == 1
    adaptive = student_for("timm_fused", "block adaptive", pixels)
    again(adaptive)
    assert not adaptive._recorded.kept and not recwarn.list


def test_a_frozen_model(pixels: Tensor) -> None:
    model = MODELS["timm_fused"]()
    run = recorded_pass(model, 17)
    assert all(torch.equal(run(pixels), call(model, pixels)) for _ in range(RECORDED + 1))
    assert [replay.recorded for _, replay in run.kept.values()] == [True]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", WHOLE)
def test_prompts_with_images(name: str) -> None:
    """Prompts, and the tokens behind them, are those of modules, and are recorded."""
    student = student_of(name, PRUNING)
    inputs = make_prompts(student.model, (1, 1), left=True)
    expected = student.model.generate(**inputs, **FOUR)
    for _ in range(RECORDED + 1):
        same(student.generate(**inputs, **FOUR), expected)
    prompts, steps = student._decoding._prompts, student._decoding._steps
    assert prompts is not None
    made = [replay for kept in (prompts.kept, steps, prompts.tower.kept) for _, replay in kept.values()]
    assert len(made) == 2 + (name in ALIKE) and all(isinstance(x, Replay) and x.recorded for x in made)
    with student.teacher():
        plain = student.model.generate(**inputs, **FOUR)
        assert torch.equal(torch.stack(student.generate(**inputs, **FOUR).logits), torch.stack(plain.logits))
