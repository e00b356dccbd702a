"""OPT, whose blocks run the linear layers of their MLP themselves, on the tokens of all rows in one dimension: no token
can skip the MLP, and all else is routed as in any language model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from students import LoraSpec, RouterSpec, StudentSpec, elasticize
from students.calibration.language import calibrate
from students.families.language import LanguageStudent
from students.kernels import devices
from tests.pico.language import make_tiny
from tests.students.test_decoding import SIX, both, student_for
from tests.students.test_execution import CLOSE, assert_counted, assert_one_however_it_runs, in_both_ways
from tests.students.test_students import scramble

HEAD = RouterSpec("vocab", rank=5)
SPECS = {
    "default": StudentSpec((RouterSpec("channel"), HEAD), LoraSpec(2)),
    "attention": StudentSpec((RouterSpec("token", sites=("attn",), substitute=3), RouterSpec("head")), LoraSpec(2)),
    "drop": StudentSpec((RouterSpec("token", sites=("attn",), kv="drop"), RouterSpec("channel")), gains=True),
    "static": StudentSpec((RouterSpec("channel", network="static"), RouterSpec("head", network="static"))),
}


def make(kind: str, **settings: object) -> LanguageStudent:
    """Return a tiny student with random routers."""
    student = scramble(elasticize(make_tiny("opt", **settings), SPECS[kind])).train(False)
    assert isinstance(student, LanguageStudent)
    return student


def test_open_gates_change_no_bit(tokens: Tensor) -> None:
    model = make_tiny("opt")
    before, text = model(tokens).logits, model.generate(tokens, **SIX)
    for spec in SPECS.values():
        student = elasticize(make_tiny("opt"), spec)
        with torch.no_grad():
            assert torch.equal(student(tokens)[0].logits, before)
        assert torch.equal(student.generate(tokens, **SIX), text)
        with student.teacher(), torch.no_grad():  # after a call with another number of rows
            assert torch.equal(student(tokens[:1, :7])[0].logits, model(tokens[:1, :7]).logits)
            assert torch.equal(student.model(tokens[:1, :7]).logits, model(tokens[:1, :7]).logits)


@pytest.mark.parametrize("kind", SPECS)
@torch.no_grad()
def test_routed_it_is_the_same_however_it_runs(
    kind: str, tokens: Tensor, padding: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make(kind)
    assert_one_however_it_runs(student, tokens, padding, monkeypatch)
    student.runtime.offset = (0.3, -0.3)  # each row has its own
    torch.testing.assert_close(*in_both_ways(student, tokens), **CLOSE)
    assert_counted(make(kind, attn_implementation="eager"), tokens[:1])


@pytest.mark.parametrize("operators", ["c"], indirect=True)
@torch.no_grad()
def test_decode_steps_are_recorded(tokens: Tensor, monkeypatch: pytest.MonkeyPatch, operators: None) -> None:
    for ahead in (False, True):
        monkeypatch.setattr(devices, "runs_ahead", lambda device, ahead=ahead: ahead)
        student = student_for("opt", SPECS["default"])
        assert torch.equal(*both(student, tokens, **SIX)) and student._decoding.made == 1


@torch.no_grad()
def test_what_the_activation_makes_zero_is_not_read(tokens: Tensor) -> None:
    student = elasticize(make_tiny("opt"), SPECS["default"])
    _, decisions = student(tokens)
    open_ = torch.stack([decisions.share[f"{number}.mlp_out.channel"] for number in (0, 1)])
    assert open_.shape == (2, 2, 12) and 0.3 < open_.mean() < 0.7


def test_calibration_and_training(tokens: Tensor) -> None:
    student = elasticize(make_tiny("opt"), SPECS["default"])
    assert isinstance(student, LanguageStudent)
    assert calibrate(student, tokens.split(1), 0.8, "decode").compute == pytest.approx(0.8, abs=0.02)
    student = make("default").train()
    out, decisions = student(tokens)
    spent = student.compute.ratio(decisions, torch.ones(2, 12, dtype=torch.bool), "decode")
    (out.logits.logsumexp(-1).mean() + spent).backward()
    grads = [parameter.grad for parameter in student.added_parameters().values()]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads)


@pytest.mark.parametrize("router", [RouterSpec("token"), RouterSpec("layer"), RouterSpec("expert")])
def test_routers_that_read_what_the_mlp_reads_are_refused(router: RouterSpec) -> None:
    with pytest.raises(ValueError, match="run the layers of their MLP themselves"):
        elasticize(make_tiny("opt"), StudentSpec((router,)))
