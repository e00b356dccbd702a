"""Gradients written out by hand: gates, divergences, attention, norms against what torch makes of their definitions."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from elastic.accounting.sums import divergence_of
from elastic.config import LossConfig
from losses import forward_kl
from students import elasticize
from students.kernels.attention_gradient import LARGEST, fast_attention_gradients
from students.kernels.cpu import toolchain
from students.kernels.norms import fuse_norms
from students.routers import selection
from tests.pico.language import make_tiny
from tests.students.test_execution import SPECS
from tests.students.test_students import scramble

CLOSE = {torch.float32: dict(atol=1e-5, rtol=1e-4), torch.bfloat16: dict(atol=0.03, rtol=0.03)}


def ramp(distance: Tensor, near: Tensor) -> Tensor:
    """1 or 0, as the distance is at least 0 or not, with a gradient of 1 where it is near 0."""
    soft = torch.where(near, distance, distance.detach())
    return (distance >= 0).to(distance.dtype) + (soft - soft.detach())


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [grad.float() for grad in torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(77,), (3, 1, 77)])
def test_channel_gate(shape: tuple[int, ...], dtype: torch.dtype, operators: None):
    torch.manual_seed(0)
    x = torch.randn(3, 20, 77).to(dtype).requires_grad_()
    log_limit = (torch.randn(shape) * 0.3 - 0.7).requires_grad_()
    by_out, by_share = torch.randn(3, 20, 77), torch.randn(3, 20)
    out, share = selection.channel(x, log_limit)
    found = gradients((out * by_out.to(dtype)).sum() + (share * by_share).sum(), x, log_limit)

    limit = log_limit.exp().to(dtype).float()
    keep = (x.abs() >= limit).float()
    assert torch.equal(out, torch.where(keep > 0, x, 0))
    torch.testing.assert_close(share, keep.mean(-1))
    low, high = ((log_limit + shift).exp().to(dtype) for shift in (-0.5, 0.5))
    opens = ramp(x.detach().float().abs().log() - log_limit, (x.abs() >= low) & (x.abs() < high))
    slopes = gradients((opens * x * by_out.to(dtype)).sum() + (opens.mean(-1) * by_share).sum(), log_limit)
    torch.testing.assert_close(found[0], keep * by_out.to(dtype).float(), **CLOSE[dtype])
    torch.testing.assert_close(found[1], slopes[0], **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_gate(dtype: torch.dtype, operators: None):
    torch.manual_seed(0)
    exact, preview = (torch.randn(5, 301).to(dtype).requires_grad_() for _ in range(2))
    limit, tail = torch.randn(5, 1).requires_grad_(), torch.tensor(0.3125, requires_grad=True)
    by_out, by_share = torch.randn(5, 301).to(dtype), torch.randn(5)
    out, share = selection.rows(exact, preview, limit, tail)
    found = gradients((out * by_out).sum() + (share * by_share).sum(), exact, preview, limit, tail)

    keep = preview.detach() >= limit.detach().to(dtype)
    assert torch.equal(out, torch.where(keep, exact, preview + tail.to(dtype)))
    torch.testing.assert_close(share, keep.float().mean(-1))
    low, high = ((limit + shift).to(dtype) for shift in (-0.5, 0.5))
    opens = ramp(preview.detach().float() - limit, (preview >= low) & (preview < high))
    mixed = torch.where(keep, exact.float(), preview.float() + tail)
    mixed = mixed + (opens - opens.detach()) * (exact - preview - tail).detach().float()
    expected = gradients((mixed * by_out).sum() + (opens.mean(-1) * by_share).sum(), exact, preview, limit, tail)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_kl_of_training_is_that_of_losses(dtype: torch.dtype, operators: None):
    torch.manual_seed(0)
    student, teacher = ((torch.randn(7, 1234) * scale).to(dtype) for scale in (3, 4))
    student[0, 3] = teacher[0, 3] = 300.0  # certain, and the rest underflows
    student[1] = teacher[1]
    student.requires_grad_()
    by = torch.randn(7)
    found, expected = divergence_of(LossConfig())(student, teacher), forward_kl(student, teacher)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found[1] == 0 or (not toolchain.native(student) and found[1].abs() < 1e-6)
    a, b = (gradients((value * by).sum(), student)[0] for value in (found, expected))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 0.01)


def test_forward_kl_of_training_tells_of_what_is_not_finite(operators: None):
    logits = torch.zeros(2, 64)
    logits[0, 5] = torch.nan
    for teacher in (torch.zeros(2, 64), logits):
        assert divergence_of(LossConfig())(logits, teacher).isnan().tolist() == [True, False]


@pytest.mark.parametrize("mask", ["causal", "none", "bool", "additive"])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_attention_has_attention_s_gradient(dtype: torch.dtype, heads: int, mask: str, operators: None):
    torch.manual_seed(0)
    query = torch.randn(2, heads, 11, 8).to(dtype).requires_grad_()
    key, value = (torch.randn(2, 2, 13 if mask != "causal" else 11, 8).to(dtype).requires_grad_() for _ in range(2))
    options = dict(enable_gqa=heads > 2, scale=0.3, is_causal=mask == "causal")
    inputs = [query, key, value]
    if mask == "bool":
        options["attn_mask"] = torch.rand(2, 1, 11, 13) > 0.3
    if mask == "additive":
        options["attn_mask"] = torch.randn(2, 1, 11, 13).to(dtype).requires_grad_()
        inputs.append(options["attn_mask"])
    by = torch.randn(2, heads, 11, 8).to(dtype)
    expected = gradients((F.scaled_dot_product_attention(query, key, value, **options) * by).sum(), *inputs)
    with fast_attention_gradients(query.device):
        out = F.scaled_dot_product_attention(query, key, value, **options)
    assert type(out.grad_fn).__name__ == "_AttentionBackward"
    with torch.no_grad(), fast_attention_gradients(query.device):
        assert torch.equal(out, F.scaled_dot_product_attention(query, key, value, **options))
    for a, b in zip(gradients((out * by).sum(), *inputs), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE[dtype])


def test_long_attention_keeps_torch_s_gradient():
    tokens = int((LARGEST / 4) ** 0.5) + 1
    query = torch.randn(1, 1, tokens, 8, requires_grad=True)
    with fast_attention_gradients(query.device):
        out = F.scaled_dot_product_attention(query, query, query)
    assert type(out.grad_fn).__name__ != "_AttentionBackward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, Gemma3RMSNorm, Olmo2RMSNorm, nn.RMSNorm])
def test_rms_norms_have_their_gradient_and_their_bits(norm: type[nn.Module], dtype: torch.dtype, operators: None):
    torch.manual_seed(0)
    for width in (16, 48, 100, 576, 2048):
        model = nn.Sequential(norm(width, eps=1e-3)).to(dtype).requires_grad_(False)
        model[0].weight.normal_()
        x, by = (torch.randn(7, 30, width).to(dtype).transpose(0, 1) for _ in range(2))
        x.requires_grad_()
        plain = model(x)
        expected = gradients((plain * by).sum(), x)
        fuse_norms(model)
        assert torch.equal(model(x), plain)
        assert (type(model(x).grad_fn).__name__ == "_NormBackward") == (toolchain.native(x) is not None)
        with torch.no_grad():
            assert torch.equal(model(x), plain)
            assert torch.equal(copy.deepcopy(model)(x[:0]), plain[:0])
            model[0].weight.mul_(3)
            assert not torch.equal(model(x), plain)
            model[0].weight.div_(3)
        torch.testing.assert_close(gradients((model(x) * by).sum(), x), expected, **CLOSE[dtype])


def test_norms_that_learn_or_compute_something_else_are_left_alone(operators: None):
    class HalfRMSNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * super().forward(x) + x

    x = torch.randn(4, 32, requires_grad=True)
    for norm in (HalfRMSNorm(32, eps=1e-6).requires_grad_(False), LlamaRMSNorm(32), nn.LayerNorm(32)):
        plain = norm(x)
        fuse_norms(nn.Sequential(norm))
        out = norm(x)
        assert torch.equal(out, plain)
        assert type(out.grad_fn).__name__ != "_NormBackward"


def test_compilers_meet_the_norm_as_it_was(operators: None):
    model = nn.Sequential(LlamaRMSNorm(32)).requires_grad_(False)
    fuse_norms(model)
    x = torch.randn(3, 32)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "gpt2"])
def test_students_learn_from_the_same_gradients(
    name: str, tokens: Tensor, operators: None, monkeypatch: pytest.MonkeyPatch
):
    student = scramble(elasticize(make_tiny(name), SPECS["mixed-channels"])).train(True)

    def learn() -> tuple[Tensor, list[Tensor]]:
        out = student(tokens)[0].logits
        return out, gradients(out.square().mean(), *student.added_parameters().values())

    fast, found = learn()
    monkeypatch.setattr("students.student.fast_attention_gradients", lambda device: nullcontext())
    monkeypatch.setattr("students.kernels.norms._recipe", lambda *_: None)
    plain, expected = learn()
    assert torch.equal(fast, plain)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
