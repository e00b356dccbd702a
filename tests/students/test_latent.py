"""Multi-head latent attention, besides test_architectures.py and test_mixtures.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elastic.accounting.memory import cache_need
from students import LoraSpec, RouterSpec, StudentSpec, elasticize
from students.calibration.language import calibrate
from students.execution.attention import route_trunk
from students.execution.kv_cache import cache_bytes
from students.execution.latent import attend_to_latents, expanded
from students.families.language import LanguageStudent
from students.libraries import cache_of
from students.recording.decoding import Decoding
from teachers.quantize import quantize
from tests.pico.language import make_tiny
from tests.students.tape import Tape
from tests.students.test_decoding import SIX
from tests.students.test_execution import (
    CLOSE,
    assert_counted,
    assert_decodes_in_one_pass,
    assert_one_however_it_runs,
)
from tests.students.test_hybrids import assert_texts_of_recorded_steps
from tests.students.test_students import MIXED, scramble

MODELS = ["youtu", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"]
DEFAULT = StudentSpec((RouterSpec("channel"), RouterSpec("vocab", rank=5)), LoraSpec(2))
SPECS = {
    "keep": StudentSpec((RouterSpec("token", substitute=3), RouterSpec("head"), RouterSpec("channel")), LoraSpec(2)),
    "drop": StudentSpec((RouterSpec("token", kv="drop"),), gains=True),
    "layers": StudentSpec((RouterSpec("layer", kv="drop", blocks="odd"),)),
}
ALL = torch.ones(1, 12, dtype=torch.bool)


def make(name: str, spec: StudentSpec = DEFAULT, **settings: object) -> LanguageStudent:
    """Return a tiny student with random routers."""
    student = scramble(elasticize(make_tiny(name, **settings), spec)).train(False)
    assert isinstance(student, LanguageStudent)
    return student


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_attention_to_latents_is_attention_to_keys(name: str) -> None:
    attention = make_tiny(name).base_model.layers[-1].self_attn
    query, latents, rotary = torch.randn(2, 4, 3, 18), torch.randn(2, 1, 7, 24), torch.randn(2, 1, 7, 8)
    mask = torch.rand(2, 1, 3, 7) < 0.7
    mask[..., 0] = True
    keys, values = expanded(attention, latents, rotary)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, scale=0.3)
    found, weights = attend_to_latents(attention, query, latents, rotary, mask, scaling=0.3)
    torch.testing.assert_close(found.transpose(1, 2), expected, **CLOSE)
    assert weights.shape == (2, 4, 3, 7) and not weights.masked_select(~mask).any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", SPECS)
@torch.no_grad()
def test_mask_is_skip_is_cached_decoding(
    kind: str, name: str, tokens: Tensor, padding: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_one_however_it_runs(make(name, SPECS[kind]), tokens, padding, monkeypatch)


@pytest.mark.parametrize("kind", SPECS)
@torch.no_grad()
def test_reported_compute_is_what_torch_counts(kind: str, tokens: Tensor) -> None:
    assert_counted(make("youtu", SPECS[kind], attn_implementation="eager"), tokens[:1])


@torch.no_grad()
def test_costs_and_cache_are_those_of_latents(tokens: Tensor) -> None:
    student = make("youtu")
    block = student.compute.blocks[0]
    assert (block.q, block.kv, block.expand_q) == (32 * 20, 32 * (24 + 8), 20 * 4 * 18)
    assert (block.expand_kv, block.per_key, block.per_latent) == (24 * 4 * 22, 4 * (18 + 12), 4 * (2 * 24 + 8))
    held = cache_of(student.model(tokens, use_cache=True))
    assert cache_bytes(held) == 2 * cache_need(student.trunk, 12) == 2 * 2 * 12 * (24 + 8) * 4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("operators", ["c"], indirect=True)
@torch.no_grad()
def test_decoding_is_recorded(
    name: str, tokens: Tensor, padding: Tensor, monkeypatch: pytest.MonkeyPatch, operators: None
) -> None:
    assert_texts_of_recorded_steps(make(name), tokens, padding, monkeypatch)
    student = make(name, SPECS["drop"])
    plain = student.model.generate(tokens[:1], **SIX)
    student._decoding.recorder = Tape
    assert torch.equal(student.generate(tokens[:1], **SIX), plain) and student._decoding._steps


@torch.no_grad()
def test_the_dense_model_decodes_from_latents_too(tokens: Tensor) -> None:
    """Routed or not, a model's own text comes from steps whose products do not grow with the text."""
    student = make("youtu")
    options = dict(SIX, max_new_tokens=14, min_new_tokens=14)
    with student.teacher():
        own = student.model.generate(tokens[:1], **options)
        frozen = Decoding(student.model, student.trunk, recorder=Tape)
        assert torch.equal(frozen.generate(tokens[:1], **options), own)
    assert torch.equal(student.generate(tokens[:1], lossless=True, **options), own)
    model, made = make_tiny("youtu"), []
    route_trunk(model.base_model)
    model.base_model.layers[0].self_attn.kv_b_proj.register_forward_hook(lambda *_: made.append(1))
    assert torch.equal(model.generate(tokens[:1], **options), own)
    assert made == [1]  # for the prompt


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_mixture_is_calibrated(phase: str, tokens: Tensor) -> None:
    routers = RouterSpec("token", kv="drop", substitute=3), RouterSpec("mixture"), RouterSpec("vocab", rank=5)
    student = elasticize(make_tiny("deepseek_v3"), StudentSpec(routers))
    start = calibrate(student, tokens.split(1), 0.8, phase)
    assert start.compute == pytest.approx(0.8, abs=0.02)
    assert all(parameter.isfinite().all() for parameter in student.added_parameters().values())


def test_routers_learn(tokens: Tensor) -> None:
    student = make("youtu", MIXED).train()
    out, decisions = student(tokens)
    loss = out.logits.logsumexp(-1).mean() + student.compute.ratio(decisions, ALL.expand(2, 12), "decode")
    loss.backward()
    grads = [parameter.grad for parameter in student.added_parameters().values()]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads)


@torch.no_grad()
def test_a_quantized_base_decodes_from_latents_too(tokens: Tensor) -> None:
    pytest.importorskip("torchao")
    model = make_tiny("youtu", hidden_size=64, intermediate_size=64, kv_lora_rank=32)
    quantize(model, "int8", torch.device("cpu"))
    student = scramble(elasticize(model, SPECS["drop"])).train(False)
    assert_decodes_in_one_pass(student, tokens)
    assert hasattr(student.blocks[0].self_attn.base_layer, "recovered")
