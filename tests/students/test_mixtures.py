"""Mixtures of experts: every invariant of language models, counted compute, and the routers that choose experts."""

from __future__ import annotations

import pytest
import torch

from elastic.accounting.counters import count
from students import LoraSpec, RouterSpec, StudentSpec, elasticize
from students.calibration.language import calibrate
from students.families.language import LanguageStudent
from tests.pico.language import TINY_MIXTURES, make_tiny
from tests.students.test_decoding import SIX, both
from tests.students.test_execution import CLOSE, assert_decodes_in_one_pass, assert_mask_is_skip, in_both_ways
from tests.students.test_students import scramble

MIXTURE = RouterSpec("mixture")
SPECS = {
    "default": StudentSpec((MIXTURE, RouterSpec("channel"), RouterSpec("vocab", rank=5)), LoraSpec(2)),
    "tokens": StudentSpec((RouterSpec("token", substitute=3), RouterSpec("head"), RouterSpec("channel"), MIXTURE)),
    "drop": StudentSpec((RouterSpec("token", kv="drop"), MIXTURE), gains=True),
    "layers": StudentSpec((RouterSpec("layer", kv="drop", blocks="odd"), MIXTURE)),
}
ROUTED = ("qwen3_moe", "gpt_oss", "gemma4_moe", "granitemoeshared")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
ALL = torch.ones(1, 12, dtype=torch.bool)


def make(name: str, spec: StudentSpec, experts: str = "grouped_mm", close: bool = True) -> LanguageStudent:
    """Return a tiny student; close: with random routers, which close about half of all gates."""
    model = make_tiny(name)
    model.set_experts_implementation(experts)
    student = elasticize(model, spec)
    assert isinstance(student, LanguageStudent)
    if not close:
        return student
    with torch.no_grad():
        for parameter, value in scramble(student).added_parameters().items():
            if parameter.endswith("mixture.log_limit"):
                value.sub_(0.8)
    return student.train(False)


@pytest.mark.parametrize("name", [name for name in TINY_MIXTURES if name != "gemma4_moe"])  # in test_gemma4.py
def test_open_student_is_the_teacher_bit_for_bit(name: str, tokens: torch.Tensor) -> None:
    model = make_tiny(name)
    before, text = model(tokens).logits, model.generate(tokens, **SIX)
    student = elasticize(model, StudentSpec((RouterSpec("token", substitute=2), *SPECS["default"].routers)))
    with torch.no_grad():
        assert torch.equal(before, student(tokens)[0].logits)
    assert torch.equal(text, student.generate(tokens, **SIX))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "default") for name in TINY_MIXTURES),
        *((name, kind) for name in ROUTED for kind in ("tokens", "drop", "layers")),
    ],
)
@torch.no_grad()
def test_mask_is_skip_is_cached_decoding(name: str, kind: str, tokens: torch.Tensor, padding: torch.Tensor) -> None:
    student = make(name, SPECS[kind], IMPLEMENTATIONS[list(TINY_MIXTURES).index(name) % 3])
    assert 0.05 < torch.cat([s for k, s in student(tokens)[1].share.items() if "mixture" in k]).mean() < 0.95
    torch.testing.assert_close(*in_both_ways(student, tokens), **CLOSE)
    assert_decodes_in_one_pass(student, tokens)
    student.runtime.offset = (0.3, -0.3)  # each row has its own
    assert_mask_is_skip(student, tokens, padding)


@pytest.mark.parametrize(
    ("name", "experts"),
    [*((name, "grouped_mm") for name in TINY_MIXTURES), ("gpt_oss", "eager"), ("qwen3_moe", "batched_mm")],
)
@torch.no_grad()
def test_counted_compute_is_reported_compute(name: str, experts: str, tokens: torch.Tensor) -> None:
    student = make(name, StudentSpec((RouterSpec("token"), MIXTURE)), experts)
    student.model.set_attn_implementation("eager")
    with student.teacher():
        dense = count(lambda: student(tokens[:1], use_cache=False))[0] / 2
    assert float(student.compute.dense(ALL, "prefill").sum()) == pytest.approx(dense, rel=0.01)
    spent = count(lambda: student(tokens[:1], use_cache=False))[0] / 2
    _, decisions = student(tokens[:1], use_cache=False)
    assert spent / dense == pytest.approx(float(student.compute.ratio(decisions, ALL, "prefill")), rel=0.01)


@torch.no_grad()
def test_bytes_are_those_of_the_experts_that_are_used(tokens: torch.Tensor) -> None:
    """One token reads three of eight experts in each of three blocks, and no expert if all are closed."""
    student = make("mixtral", StudentSpec((MIXTURE,)), close=False)
    read = []
    for limit in (-30.0, 30.0):
        for parameter in student.added_parameters().values():
            parameter.fill_(limit)
        student.prepare()
        read.append(count(lambda: student(tokens[:1, :1], use_cache=False))[1])
    assert read[0] - read[1] == 3 * 3 * (3 * 32 * 48) * 4  # gate, up and down of each expert, in float32


@pytest.mark.parametrize("name", ["mixtral", *ROUTED])
@torch.no_grad()
def test_recorded_steps_decode_the_same_text(name: str, tokens: torch.Tensor) -> None:
    assert torch.equal(*both(make(name, SPECS["default"]), tokens, **SIX))


def test_limits_learn_from_logits_and_compute(tokens: torch.Tensor) -> None:
    student = make("mixtral", StudentSpec((MIXTURE,))).train()
    out, decisions = student(tokens)
    spent = student.compute.ratio(decisions, ALL.expand(2, 12), "decode")
    for loss in (out.logits.logsumexp(-1).mean(), spent):
        grads = torch.autograd.grad(loss, list(student.added_parameters().values()), retain_graph=True)
        assert all(grad.isfinite().all() and grad.any() for grad in grads)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_calibrated_limits_meet_the_budget(phase: str) -> None:
    student = make("mixtral", StudentSpec((MIXTURE,)), close=False)
    windows = torch.randint(3, 120, (12, 32), generator=torch.Generator().manual_seed(0))
    start = calibrate(student, windows[:8].split(4), 0.75, phase)
    assert start.compute == pytest.approx(0.75, abs=0.005)
    with torch.no_grad():
        ratio = student.compute.ratio(student(windows[8:])[1], torch.ones(4, 32, dtype=torch.bool), phase)
    assert float(ratio) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("router", [RouterSpec("channel", ("mlp_in",)), RouterSpec("expert"), RouterSpec("neuron")])
def test_routers_within_dense_mlps_are_refused(router: RouterSpec) -> None:
    with pytest.raises(ValueError, match=r"MLP"):
        elasticize(make_tiny("mixtral"), StudentSpec((router,)))


def test_experts_of_dense_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dense"):
        elasticize(make_tiny("llama"), StudentSpec((MIXTURE,)))
    spec = StudentSpec((RouterSpec("mixture", optional=True), RouterSpec("channel")))
    assert [router.kind for router in elasticize(make_tiny("llama"), spec).spec.routers] == ["channel"]
    assert [router.kind for router in elasticize(make_tiny("mixtral"), spec).spec.routers] == ["mixture", "channel"]
