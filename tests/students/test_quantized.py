"""Quantized teachers: routers learn, masks agree with skipping, and layers that always run dense count as dense."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from students import LoraSpec, RouterSpec, Student, StudentSpec, elasticize
from students.architectures.lookup import can_be_read_in_part, shape_of, values_of
from students.compute import PHASES
from students.sites import LINEAR_SITES
from teachers.quantize import PACKAGES, kept_bytes, quantize
from tests.pico.language import make_tiny
from tests.pico.vision_language import make_prompts, make_vlm
from tests.students.test_execution import CLOSE, SPECS, assert_counted, assert_decodes_in_one_pass, in_both_ways
from tests.students.test_students import EVERY_KIND, scramble
from tests.students.test_vision_language import PRUNING

SCHEMES = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(package) is None, reason=f"no {package}"))
    for name, package in PACKAGES.items()
]
BYTES = {"int8": 1, "int4": 1, "nf4": 0.5}
"""Bytes per weight, without scales (torchao stores 4 bits in a byte)."""
WIDE = dict(hidden_size=64, intermediate_size=72)
"""Sizes with which the MLP's last layer is quantized by int8 alone: groups of weights do not divide 72."""
OPAQUE = {"int8": set(LINEAR_SITES), "int4": set(LINEAR_SITES[:-1]), "nf4": set(LINEAR_SITES[:-1])}
KINDS = ["channel", "expert", "head-static", "layer", "mixed", "mixed-channels", "mixed-neuron", "token"]

pytestmark = pytest.mark.parametrize("scheme", SCHEMES)


def quantized(scheme: str, name: str = "llama"):
    model = make_tiny(name, **WIDE)
    quantize(model, scheme, torch.device("cpu"))
    return model


def make(scheme: str, spec: StudentSpec) -> Student:
    student = scramble(elasticize(quantized(scheme), spec)).train(False)
    student.runtime.capacity = 0.5
    return student


def test_blocks_are_quantized_and_heads_are_not(scheme: str):
    whole, model = make_tiny("llama", **WIDE), quantized(scheme)
    assert can_be_read_in_part(model.lm_head)
    for dense, packed in zip(whole.model.layers, model.model.layers, strict=True):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"):
            a, b = dense.get_submodule(name), packed.get_submodule(name)
            assert not can_be_read_in_part(b) and shape_of(a) == shape_of(b)
            assert (values_of(b) - a.weight).norm() < (0.02 if scheme == "int8" else 0.2) * a.weight.norm()
        linears = [m for m in packed.modules() if isinstance(m, torch.nn.Linear) and m.in_features == 64]
        weights = sum(shape_of(m)[0] * shape_of(m)[1] for m in linears)
        assert weights * BYTES[scheme] <= sum(map(kept_bytes, linears)) < weights * (BYTES[scheme] + 0.3)


def test_open_student_is_the_teacher_bit_for_bit(scheme: str, tokens: torch.Tensor):
    model = quantized(scheme)
    with torch.no_grad():
        before = model(tokens).logits
        student = elasticize(model, SPECS["mixed-channels"])
        assert torch.equal(student(tokens)[0].logits, before)
        with student.teacher():
            assert torch.equal(student(tokens)[0].logits, before)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_mask_is_skip_is_cached_decoding(scheme: str, kind: str, tokens: torch.Tensor, operators: None):
    student = make(scheme, SPECS[kind])
    for batch in (tokens, tokens[:1], tokens[:1, :1]):
        torch.testing.assert_close(*in_both_ways(student, batch), **CLOSE)
    assert_decodes_in_one_pass(student, tokens)


@torch.no_grad()
def test_reported_compute_is_what_is_done(scheme: str, tokens: torch.Tensor):
    """Quantized layers skip tokens, but read closed channels, heads and neurons all the same, which is counted."""
    for kind in ("mixed", "mixed-neuron"):
        student = make(scheme, SPECS[kind])
        student.model.set_attn_implementation("eager")
        assert_counted(student, tokens[:1])
    for kind in ("channel", "neuron", "head", "expert"):
        compute = elasticize(quantized(scheme), StudentSpec((EVERY_KIND[kind],))).compute
        assert all(block.opaque == OPAQUE[scheme] for block in compute.blocks)
        if kind == "channel" and scheme != "int8":
            continue
        for phase in PHASES:
            assert compute.uniform(0.0, 12, phase) == compute.uniform(1.0, 12, phase) >= 1


def test_gradients_reach_the_routers_alone(scheme: str, tokens: torch.Tensor):
    student = make(scheme, StudentSpec((RouterSpec("token", substitute=2), RouterSpec("channel")), LoraSpec(2)))
    student.train()(tokens)[0].logits.square().mean().backward()
    learned = {name for name, p in student.model.named_parameters() if p.grad is not None}
    assert learned == set(student.added_parameters())
    assert sum(bool(p.grad.abs().sum() > 0) for p in student.added_parameters().values()) > len(learned) / 2


@torch.no_grad()
def test_image_tokens_stay_outside_a_quantized_language_model(scheme: str):
    model = make_vlm("llava").eval()
    quantize(model, scheme, torch.device("cpu"))
    student = scramble(elasticize(model, StudentSpec((PRUNING, RouterSpec("token"))))).train(False)
    student.image_router.set_quota(torch.linspace(-0.5, 0.5, 200))
    inputs = make_prompts(student.model)
    out, decisions = student(**inputs)
    student.runtime.execution = "mask"
    whole, _ = student(**inputs)
    assert decisions.valid.shape[1] < inputs["input_ids"].shape[1]
    rows = whole.logits.gather(1, decisions.index.unsqueeze(-1).expand(-1, -1, whole.logits.shape[-1]))
    torch.testing.assert_close(out.logits[decisions.valid], rows[decisions.valid], **CLOSE)


def test_a_quantized_head_takes_no_vocab_router(scheme: str):
    model = quantized(scheme)
    model.lm_head = model.model.layers[0].mlp.gate_proj
    with pytest.raises(ValueError, match="LM head"):
        elasticize(model, StudentSpec((RouterSpec("vocab", rank=5),)))
