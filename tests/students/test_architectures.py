"""Architectures of `MORE`: with open gates a student is its teacher, and routed it is the same however it runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from students import RouterSpec, StudentSpec, elasticize
from students.calibration.language import calibrate
from students.kernels import devices
from tests.pico.language import MORE, make_tiny
from tests.students.test_decoding import DEFAULT, SIX, both, student_for
from tests.students.test_execution import CLOSE, GATED, SPECS, assert_counted, decode, eager, make
from tests.students.test_students import open_student_of

KINDS = ["mixed", "mixed-keep", "layer-drop", "head-static"]
pytestmark = pytest.mark.parametrize("name", MORE)


def test_open_gates_change_no_bit(name: str, tokens: Tensor, padding: Tensor) -> None:
    open_student_of(make_tiny(name), tokens, padding)


@torch.no_grad()
def test_routed_it_is_the_same_however_it_runs(
    name: str, tokens: Tensor, padding: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid, prompt = padding.bool(), padding.bool() & (torch.arange(12) < 5)
    given = dict(attention_mask=padding, prompt=prompt, position_ids=(padding.cumsum(1) - 1).clamp(min=0))
    for kind in [*KINDS, "mixed-neuron"] if name in GATED else KINDS:
        student, close = make(name, SPECS[kind]), CLOSE
        if student.model.config._attn_implementation == "sdpa":  # eager attention answers NaN to padding in float64
            student, close = student.double(), dict(atol=1e-6, rtol=1e-6)  # no gate is this close to its limit
        skipped = student(tokens, **given)[0].logits
        student.runtime.execution = "mask"
        masked = student(tokens, **given)[0].logits
        hidden = student.features(tokens, **given)[0].last_hidden_state.flatten(0, 1)
        student.runtime.execution = "skip"
        of_hidden = student.logits(hidden, *student.head_tensors())[0].view_as(masked)
        with monkeypatch.context() as patch:
            patch.setattr(devices, "runs_ahead", lambda device: True)
            ahead = student(tokens, **given)[0].logits
        for logits in (skipped, of_hidden, ahead, decode(student, tokens, padding, 5)):
            torch.testing.assert_close(masked[valid], logits[valid], **close)
        torch.testing.assert_close(masked[1:], decode(student, tokens[1:], None, 5), **close)


@torch.no_grad()
def test_flops_and_recorded_steps(name: str, tokens: Tensor) -> None:
    assert_counted(eager(name, SPECS["mixed"]), tokens[:1])
    student = student_for(name, DEFAULT)
    plain, recorded = both(student, tokens, **SIX)
    assert student._decoding.made == 1 and torch.equal(plain, recorded)


def test_calibration_meets_the_target(name: str, tokens: Tensor) -> None:
    student = elasticize(make_tiny(name), StudentSpec((RouterSpec("channel"), RouterSpec("vocab", rank=5))))
    start = calibrate(student, tokens.split(1), 0.7, "decode")
    assert start.compute == pytest.approx(0.7, abs=0.02)
    assert all(parameter.isfinite().all() for parameter in student.added_parameters().values())
