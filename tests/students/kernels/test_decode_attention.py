"""Attention of one token to a cache: which keys it sees, with any number of ranges, and where it replaces torch's."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from students import RouterSpec, StudentSpec, elasticize
from students.execution.attention import route_trunk
from students.families.language import LanguageStudent
from students.kernels import cpu, ops, reference
from students.kernels.cpu import operators, toolchain
from students.kernels.triton import tuning
from students.libraries import cache_of
from students.recording.step import DecodeStep
from tests.backends import DTYPES
from tests.pico.language import TINY, make_tiny
from tests.students.kernels.samples import Draw
from tests.students.test_execution import CLOSE, make

FINE = {torch.float32: dict(atol=1e-5, rtol=1e-5), torch.float16: dict(atol=5e-3, rtol=5e-3)}
FINE[torch.bfloat16] = dict(atol=2e-2, rtol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_seen_does_not_matter(
    dtype: torch.dtype, backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, newest, plan = Draw(dtype, backend), 99, replace(tuning.attend(torch.device("cpu")), slots=16)
    query, keys, values = draw(1, 6, 1, 32), draw(1, 2, 192, 32), draw(1, 2, 192, 64)
    slot, kept = torch.tensor([newest]).to(backend), (keys[:, :, : newest + 1], values[:, :, : newest + 1])
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 2)
    for window in (0, 40):
        expected = reference.decode_attention(query, *kept, None, None, 0.5, window, 0.0)
        keys[:, :, newest + 1 :] = values[:, :, newest + 1 :] = 1e4
        for ranges in (1, 4):
            monkeypatch.setitem(tuning.ATTEND, tuning.capability(backend), replace(plan, resident=ranges))
            assert tuning.attend(backend).split(2, 2) == ranges
            found = ops.decode_attention(query, keys, values, None, slot, 0.5, window, 0.0)
            torch.testing.assert_close(found, expected, **FINE[dtype])


def test_ranges_fill_a_gpu_and_no_more() -> None:
    plan = tuning.ATTEND[90]
    assert [plan.split(8 * rows, 132) for rows in (1, 2, 4, 8, 16, 33, 200)] == [32, 16, 8, 4, 2, 1, 1]
    assert [plan.block(size, 2) for size in (64, 128, 256)] == [64, 64, 32] and plan.block(512, 4) == 16


def decode(model: torch.nn.Module, trunk: torch.nn.Module, tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, int]:
    """Return logits of the next token, decoded in a step of fixed shape, and the number of `decode_attention` calls."""
    out, ran, attend = model(tokens, attention_mask=valid, use_cache=True), [], ops.decode_attention
    step = DecodeStep(model, trunk, cache_of(out), 32)
    positions = torch.full((len(tokens),), tokens.shape[1]) if valid is None else valid.sum(1)
    step.load(cache_of(out), tokens.shape[1], valid, positions)
    step.advance(tokens[:, 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "decode_attention", lambda *given: ran.append(given) or attend(*given))
        return step.run(), len(ran)


@torch.no_grad()
def test_on_a_cpu_with_products_of_bfloat16(
    library: object, tokens: Tensor, padding: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator runs with and without padding; not for several query tokens, nor for a student run as teacher."""
    monkeypatch.setattr(toolchain, "loaded", library)
    monkeypatch.setattr(operators, "FEW_NUMBERS", 0)
    student = elasticize(make_tiny("llama", head_dim=32).to(torch.bfloat16), StudentSpec((RouterSpec("channel"),)))
    ran, attend = [], ops.decode_attention
    monkeypatch.setattr(ops, "decode_attention", lambda *given: ran.append(given) or attend(*given))
    if not cpu.attends_to_cache(*(torch.empty(1, 2, 1, 32, dtype=torch.bfloat16),) * 3):
        pytest.skip("no such products here")
    for valid in (None, padding):
        with student.teacher():
            cache = cache_of(student.model(tokens[:, :-1], None if valid is None else valid[:, :-1], use_cache=True))
            given = dict(attention_mask=valid, past_key_values=copy.deepcopy(cache))
            expected = student(tokens[:, -1:], **given)[0].logits
        assert not ran
        given["past_key_values"] = cache
        torch.testing.assert_close(student(tokens[:, -1:], **given)[0].logits, expected, atol=0.05, rtol=0.02)
        assert len(ran) == len(student.compute.blocks)
        ran.clear()


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(TINY))
def test_it_is_the_model_s_attention(
    name: str, tokens: Tensor, padding: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator has each architecture's windows, masks, scales and soft caps, in dense models and students."""
    dense, student = make_tiny(name), make(name, StudentSpec((RouterSpec("channel"),)))
    assert isinstance(student, LanguageStudent)
    blocks = len(student.compute.blocks)
    monkeypatch.setattr(ops, "attends_to_cache", lambda *given: False)
    before, of_student = (decode(m, m.base_model, tokens, padding) for m in (dense, student.model))
    assert before[1] == of_student[1] == 0
    route_trunk(dense.base_model)
    monkeypatch.setattr(ops, "attends_to_cache", lambda *given: given[3] is not None)
    for model, expected in ((dense, before), (student.model, of_student)):
        found, times = decode(model, model.base_model, tokens, padding)
        torch.testing.assert_close(found, expected[0], **CLOSE)
        assert times == blocks
    with student.teacher():
        found, times = decode(student.model, student.trunk, tokens, padding)
    torch.testing.assert_close(found, before[0], **CLOSE)
    assert times == blocks
