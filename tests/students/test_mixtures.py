"""Mixtures of experts: every invariant of language models, counted compute, and routers that cannot stand in them."""

from __future__ import annotations

import pytest
import torch

from elastic.accounting.counters import count
from students import LoraSpec, RouterSpec, Student, StudentSpec, elasticize
from tests.pico.language import MIXTURES, make_tiny
from tests.students.test_execution import CLOSE, assert_decodes_in_one_pass, in_both_ways
from tests.students.test_students import scramble

SPECS = {
    "channels": StudentSpec((RouterSpec("channel"), RouterSpec("vocab", rank=5)), LoraSpec(2)),
    "tokens": StudentSpec((RouterSpec("token", substitute=3), RouterSpec("head"), RouterSpec("channel"))),
    "layers": StudentSpec((RouterSpec("layer", kv="drop", blocks="odd"), RouterSpec("token", sites=("mlp",)))),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def make(name: str, spec: StudentSpec, experts: str = "grouped_mm") -> Student:
    model = make_tiny(name)
    model.set_experts_implementation(experts)
    return elasticize(model, spec)


@pytest.mark.parametrize("name", MIXTURES)
def test_open_student_is_the_teacher_bit_for_bit(name: str, tokens: torch.Tensor) -> None:
    model = make_tiny(name)
    before, text = model(tokens).logits, model.generate(tokens, max_new_tokens=12, do_sample=False)
    student = elasticize(model, StudentSpec((RouterSpec("token", substitute=2), *SPECS["channels"].routers)))
    assert torch.equal(before, student(tokens)[0].logits)
    assert torch.equal(text, student.generate(tokens, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "channels") for name in MIXTURES), ("qwen3_moe", "tokens"), ("granitemoe", "layers")]
)
@torch.no_grad()
def test_mask_is_skip_is_cached_decoding(name: str, kind: str, tokens: torch.Tensor) -> None:
    student = scramble(make(name, SPECS[kind], IMPLEMENTATIONS[list(MIXTURES).index(name) % 3])).train(False)
    torch.testing.assert_close(*in_both_ways(student, tokens), **CLOSE)
    assert_decodes_in_one_pass(student, tokens)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    masked, skipped = in_both_ways(student, tokens, mask)
    torch.testing.assert_close(masked[mask.bool()], skipped[mask.bool()], **CLOSE)


@pytest.mark.parametrize(
    ("name", "experts"),
    [*((name, "grouped_mm") for name in MIXTURES), ("qwen3_moe", "eager"), ("qwen3_moe", "batched_mm")],
)
@torch.no_grad()
def test_counted_compute_is_reported_compute(name: str, experts: str, tokens: torch.Tensor) -> None:
    student = scramble(make(name, StudentSpec((RouterSpec("token"),)), experts)).train(False)
    student.model.set_attn_implementation("eager")
    everything = torch.ones(1, 12, dtype=torch.bool)
    with student.teacher():
        dense = count(lambda: student(tokens[:1], use_cache=False))[0] / 2
    assert float(student.compute.dense(everything, "prefill").sum()) == pytest.approx(dense, rel=0.01)
    flops = count(lambda: student(tokens[:1], use_cache=False))[0] / 2
    _, decisions = student(tokens[:1], use_cache=False)
    assert flops / dense == pytest.approx(float(student.compute.ratio(decisions, everything, "prefill")), rel=0.01)


@pytest.mark.parametrize(
    "router", [RouterSpec("channel", sites=("mlp_in",)), RouterSpec("expert"), RouterSpec("neuron")]
)
def test_routers_within_dense_mlps_are_refused(router: RouterSpec) -> None:
    with pytest.raises(ValueError, match=r"MLP"):
        elasticize(make_tiny("mixtral"), StudentSpec((router,)))
