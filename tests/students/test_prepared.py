"""What skip execution prepares of weights, routers and the dial is renewed after each change, and can be undone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from students import LoraSpec, RouterSpec, Student, StudentSpec, elasticize
from students.families.language import LanguageStudent
from students.prepared import Stamp
from tests.pico.language import make_tiny
from tests.students.test_students import EVERY_KIND, MIXED, scramble

KINDS = ("token-sequence", "head", "expert", "channel", "channel-static", "vocab")
SPECS = {name: StudentSpec((EVERY_KIND[name],), LoraSpec(2)) for name in KINDS}
SPECS["mixed"] = MIXED
SPECS["head-static"] = StudentSpec((RouterSpec("head", network="static"), RouterSpec("expert", groups=4)))
CASES = [*(("llama", kind) for kind in sorted(SPECS)), ("gpt2", "head-static"), ("gpt2", "mixed")]


def write(student: Student) -> None:
    for tensor in student.added_state().values():
        if tensor.is_floating_point():
            tensor.mul_(-0.9)


def turn(student: Student) -> None:
    student.runtime.offset = 0.3


def cast(student: Student) -> None:
    for parameter in student.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


CHANGES: dict[str, Callable[[Student], object]] = {
    "parameters": write,
    "dial": turn,
    "capacity": lambda student: setattr(student.runtime, "capacity", 0.3),
    "precision": cast,
    "layout": Student.forget_layouts,
    "rows": lambda student: setattr(student.runtime, "offset", (0.2, -0.2)),
}


def answers(student: Student, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the logits of a prompt and, unless rows have budgets of their own, tokens generated from a part of it."""
    with torch.no_grad():
        whole = student(tokens)[0].logits
        if isinstance(student.runtime.offset, tuple):
            return (whole,)
        return whole, student.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False)


@pytest.fixture
def student(name: str, kind: str) -> Student:
    return scramble(elasticize(make_tiny(name), SPECS[kind])).train(False)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_change_is_seen(student: Student, change: str, tokens: torch.Tensor):
    answers(student, tokens)
    fresh = copy.deepcopy(student)
    for each in (fresh, student):
        CHANGES[change](each)
    fresh.forget_layouts()
    for one, other in zip(answers(student, tokens), answers(fresh, tokens), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "kind"), [("llama", "channel")])
def test_what_moves_there_and_back_is_laid_out_anew(student: Student, tokens: torch.Tensor):
    """Where a model comes back to, an allocator may have exchanged the addresses of equally large weights."""
    before, layouts = answers(student, tokens), student._layouts
    student.double().float()
    assert student._layouts > layouts
    for one, other in zip(answers(student, tokens), before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_call_beforehand_is_the_first_calls(student: Student, tokens: torch.Tensor):
    """Calling `prepare` first gives the bits of a student that is prepared in its first pass."""
    early = copy.deepcopy(student)
    early.prepare()
    for one, other in zip(answers(student, tokens), answers(early, tokens), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_undone_weights_lie_as_they_did(student: Student, tokens: torch.Tensor):
    before = {name: (p.stride(), p.clone()) for name, p in student.model.named_parameters()}
    answers(student, tokens)
    student.forget_layouts()
    for name, parameter in student.model.named_parameters():
        assert parameter.stride() == before[name][0] and torch.equal(parameter, before[name][1]), name


def test_a_stamp_knows_writes_moves_and_settings():
    stamp, x = Stamp(), torch.zeros(3)
    assert stamp.renew([x], 1) and not stamp.renew([x], 1)
    x.add_(1)
    assert stamp.renew([x], 1) and not stamp.renew([x], 1)
    assert stamp.renew([x], 2) and not stamp.renew([x], 2)
    x.data = x.data.clone()
    assert stamp.renew([x], 2) and not stamp.renew([x], 2)
    stamp.reset()
    assert stamp.renew([x], 2)


def test_a_teacher_that_was_moved_is_recorded_anew(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights may have other addresses even where the first has its own again, and nothing was laid out."""
    monkeypatch.setenv("ELASTIC_SELF_CHECK", "off")
    student = elasticize(make_tiny("llama"), SPECS["channel"])
    assert isinstance(student, LanguageStudent)
    before = student._taught(tokens)
    student.double().float()
    assert student._taught(tokens)[1:] != before[1:]
