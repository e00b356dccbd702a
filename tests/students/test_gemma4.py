"""Gemma 4, besides test_architectures.py: attention of two sizes, keys that are values, too, and a factor of each
block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from students import LoraSpec, RouterSpec, StudentSpec, elasticize
from students.calibration.language import calibrate, observe
from students.execution.kv_cache import cache_bytes
from students.families.language import LanguageStudent
from students.kernels import devices
from students.libraries import cache_of
from students.recording.decoding import Decoding
from tests.pico.language import make_tiny
from tests.students.tape import Tape
from tests.students.test_decoding import SIX
from tests.students.test_execution import (
    CLOSE,
    assert_counted,
    assert_decodes_in_one_pass,
    assert_mask_is_skip,
    in_both_ways,
)
from tests.students.test_hybrids import assert_texts_of_recorded_steps
from tests.students.test_students import MIXED, open_student_of, scramble

DEFAULT = StudentSpec((RouterSpec("channel"), RouterSpec("vocab", rank=5)), LoraSpec(2))
ALL = torch.ones(1, 12, dtype=torch.bool)
SCALE = 0.6


MOE = {
    "mixed": StudentSpec((RouterSpec("token", substitute=3), RouterSpec("expert", groups=5), RouterSpec("mixture"))),
    "weighted": StudentSpec((RouterSpec("token", weight="score", prefix=2), RouterSpec("neuron"))),
    "layer": StudentSpec(
        (RouterSpec("layer", substitute=2), RouterSpec("channel"), RouterSpec("mixture")), LoraSpec(2)
    ),
    "gathered": StudentSpec((RouterSpec("layer", kv="drop"), RouterSpec("mixture")), gains=True),
}


def make(spec: StudentSpec = DEFAULT, name: str = "gemma4", **settings: object) -> LanguageStudent:
    """Return a tiny student with random routers; its last block has global attention."""
    student = scramble(elasticize(make_tiny(name, **settings), spec)).train(False)
    assert isinstance(student, LanguageStudent)
    with torch.no_grad():
        for parameter, value in student.added_parameters().items():
            if parameter.endswith("mixture.log_limit"):
                value.sub_(0.8)
    return student


def test_open_gates_of_a_mixture_change_no_bit(tokens: Tensor, padding: Tensor) -> None:
    open_student_of(make_tiny("gemma4_moe"), tokens, padding)
    model = make_tiny("gemma4_moe")
    before, text = model(tokens).logits, model.generate(tokens, **SIX)
    student = elasticize(model, StudentSpec((RouterSpec("mixture"), RouterSpec("token", substitute=2))))
    with torch.no_grad():
        assert torch.equal(student(tokens)[0].logits, before)
    assert torch.equal(student.generate(tokens, **SIX), text)


@pytest.mark.parametrize("kind", MOE)
@torch.no_grad()
def test_experts_beside_an_mlp_are_left_out_with_it(
    kind: str, tokens: Tensor, padding: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, valid = make(MOE[kind], "gemma4_moe", attn_implementation="eager"), padding.bool()
    assert_counted(student, tokens[:1])
    torch.testing.assert_close(*in_both_ways(student, tokens), **CLOSE)
    assert_decodes_in_one_pass(student, tokens)
    assert_mask_is_skip(student, tokens, padding)
    skipped = student(tokens, padding)[0].logits
    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)
    torch.testing.assert_close(skipped[valid], student(tokens, padding)[0].logits[valid], **CLOSE)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_mixture_is_calibrated(phase: str, tokens: Tensor) -> None:
    student = elasticize(make_tiny("gemma4_moe"), StudentSpec((*MOE["mixed"].routers, RouterSpec("vocab", rank=5))))
    assert isinstance(student, LanguageStudent)
    start = calibrate(student, tokens.split(1), 0.75, phase)
    assert start.compute == pytest.approx(0.75, abs=0.02)
    assert all(parameter.isfinite().all() for parameter in student.added_parameters().values())


@torch.no_grad()
def test_costs_and_cache_are_those_of_each_block(tokens: Tensor) -> None:
    student = make()
    sliding, full = student.compute.blocks
    assert (sliding.q, sliding.kv, sliding.per_key, sliding.window) == (32 * 64, 2 * 32 * 32, 2 * 64, 6)
    assert (full.q, full.kv, full.per_key, full.window) == (32 * 96, 32 * 24, 2 * 96, None)
    held = student.model(tokens, use_cache=True)
    assert cache_bytes(cache_of(held)) == 2 * 4 * 2 * (5 * 2 * 16 + 12 * 24)  # a window keeps what the next token needs


def test_what_a_block_adds_is_scaled(tokens: Tensor) -> None:
    """A block without attention and MLP hands on its input times the factor, not its input."""
    routers = RouterSpec("token"), RouterSpec("layer", substitute=32)
    student = elasticize(make_tiny("gemma4"), StudentSpec(routers))
    assert isinstance(student, LanguageStudent)
    seen = observe(student, tokens.split(1))
    added = SCALE * (seen["1.attn"].y + seen["1.mlp"].y)
    torch.testing.assert_close(seen["1.layer"].y, added, atol=1e-5, rtol=1e-4)
    calibrate(student, tokens.split(1), 0.7, "prefill")
    substitute = student.blocks[1].self_attn.substitutes["layer"]
    with torch.no_grad():
        fitted = SCALE * substitute(seen["1.attn"].x)  # 24 tokens, 32 channels: the fit is exact but for a ridge
    torch.testing.assert_close(fitted, added, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("operators", ["c"], indirect=True)
@torch.no_grad()
def test_decoding_is_recorded(
    tokens: Tensor, padding: Tensor, monkeypatch: pytest.MonkeyPatch, operators: None
) -> None:
    student = make()
    assert_texts_of_recorded_steps(student, tokens, padding, monkeypatch)
    options = dict(SIX, max_new_tokens=14, min_new_tokens=14)
    frozen = Decoding(student.model, student.trunk, recorder=Tape)
    with student.teacher():
        own = student.model.generate(tokens[:1], **options)
        assert torch.equal(frozen.generate(tokens[:1], **options), own)
    assert torch.equal(student.generate(tokens[:1], lossless=True, **options), own)


@pytest.mark.parametrize(("name", "spec"), [("gemma4", MIXED), ("gemma4_moe", MOE["layer"])])
def test_routers_learn_in_both_kinds_of_blocks(name: str, spec: StudentSpec, tokens: Tensor) -> None:
    student = make(spec, name).train()
    out, decisions = student(tokens)
    loss = out.logits.logsumexp(-1).mean() + student.compute.ratio(decisions, ALL.expand(2, 12), "decode")
    loss.backward()
    grads = [parameter.grad for parameter in student.added_parameters().values()]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        ("hidden_size_per_layer_input", dict(hidden_size_per_layer_input=4, vocab_size_per_layer_input=120)),
        ("num_kv_shared_layers", dict(num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2)),
        ("use_bidirectional_attention", dict(use_bidirectional_attention="all")),
    ],
)
def test_other_parts_are_refused(part: str, setting: dict) -> None:
    model = make_tiny("gemma4", num_hidden_layers=len(setting.get("layer_types", "ab")), **setting)
    with pytest.raises(ValueError, match=f"Gemma4ForCausalLM.* is .*supported.*{part}"):
        elasticize(model, DEFAULT)
