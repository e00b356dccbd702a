"""Hand-written gradients of gates, divergences, attention and norms agree with autograd's of their definitions."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from students import RouterSpec, StudentSpec, elasticize
from students.execution.linear import RoutedLinear
from students.kernels import attention_gradient
from students.kernels.attention_gradient import attention_gradients
from students.kernels.autograd import GateOfChannel, RoutedKL, RowGate, forward_kl
from students.kernels.cpu import toolchain
from students.kernels.norms import Recipes, fuse_norms
from tests.pico.language import make_tiny
from tests.pico.vision_language import make_prompts
from tests.students.test_execution import GATED, SPECS
from tests.students.test_image import routed
from tests.students.test_students import scramble
from tests.students.test_vision_language import student_of

CLOSE = {torch.float32: dict(atol=1e-5, rtol=1e-4), torch.bfloat16: dict(atol=0.03, rtol=0.03)}


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [grad.float() for grad in torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("mask", ["causal", "crossed", "none", "bool", "additive", "by key"])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", ["one", "many"])
def test_fast_attention_has_attention_s_gradient(
    blocks: str, dtype: torch.dtype, heads: int, mask: str, operators: None, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    if blocks == "many":
        monkeypatch.setattr("students.kernels.autograd.SCORES", 1)
        monkeypatch.setattr("students.kernels.autograd.LEAST", 4)
    query = torch.randn(2, heads, 11, 8).to(dtype).requires_grad_()
    key, value = (torch.randn(2, 2, 13 if mask != "causal" else 11, 8).to(dtype).requires_grad_() for _ in range(2))
    options = dict(enable_gqa=heads > 2, scale=0.3, is_causal=mask in ("causal", "crossed"))
    inputs = [query, key, value]
    if mask == "bool":
        options["attn_mask"] = torch.rand(2, 1, 11, 13) > 0.3
        options["attn_mask"][1, :, 4] = False  # like padding at the left
    if mask in ("additive", "by key"):
        shape = (2, 1, 11, 13) if mask == "additive" else (1, 13)
        options["attn_mask"] = torch.randn(shape).to(dtype).requires_grad_()
        inputs.append(options["attn_mask"])
    by = torch.randn(2, heads, 11, 8).to(dtype)
    expected = gradients((F.scaled_dot_product_attention(query, key, value, **options) * by).sum(), *inputs)
    with attention_gradients(query.device):
        out = F.scaled_dot_product_attention(query, key, value, **options)
    assert type(out.grad_fn).__name__ == "AttentionBackward"
    fixed = {name: x.detach() if isinstance(x, Tensor) else x for name, x in options.items()}
    with torch.no_grad(), attention_gradients(query.device):
        assert torch.equal(out, F.scaled_dot_product_attention(query, key, value, **fixed))
    torch.testing.assert_close(gradients((out * by).sum(), *inputs), expected, **CLOSE[dtype])


@pytest.mark.parametrize("probes", [False, True])
@pytest.mark.parametrize("spec", ["block", "block stays", "block merges", "image tokens"])
def test_no_mask_learns_alone_on_a_gpu(spec: str, probes: bool, monkeypatch: pytest.MonkeyPatch):
    """Attention whose mask requires a gradient has queries that do so, without which its backward pass fails there."""
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    if spec == "image tokens":
        student = student_of("llava").train(True)
        inputs = make_prompts(student.model, (1, 1))
    else:
        student, inputs = routed("timm_fused", spec, pixels).train(True), {"pixel_values": pixels}
    learned, attend = [], attention_gradient._attend

    def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if attn_mask is not None and attn_mask.requires_grad:
            learned.append(query.requires_grad)
        return attend(query, key, value, attn_mask, **options)

    monkeypatch.setattr(attention_gradient, "_attend", watched)
    monkeypatch.setattr(attention_gradient, "devices", SimpleNamespace(runs_ahead=lambda device: True))
    student.runtime.probed = {} if probes else None
    student(**inputs)
    assert learned and all(learned)


def test_no_gradient_through_masks_is_cudnn_s(monkeypatch: pytest.MonkeyPatch):
    """With masks, gradients of cuDNN's attention may be NaN; without, it is the fastest on Hopper."""
    for masks, learns in ((True, True), (True, False), (False, True)):
        with torch.set_grad_enabled(learns), attention_gradients(torch.device("cuda"), masks):
            assert torch.backends.cuda.cudnn_sdp_enabled() != (masks and learns)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    asked: list[bool] = []
    for name, context in (("attention_gradients", nullcontext()), ("recomputing", (nullcontext(), nullcontext()))):
        monkeypatch.setattr(f"students.student.{name}", lambda device, masks, made=context: asked.append(masks) or made)
    student = student_of("llava", RouterSpec("channel")).train(True)
    student.checkpoint_blocks()
    student(**make_prompts(student.model, (1, 1)))
    assert asked == [True] * (1 + len(student.blocks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routed_divergence_is_that_of_routed_logits(dtype: torch.dtype, operators: None):
    torch.manual_seed(0)
    exact, preview = (torch.randn(5, 301).to(dtype).requires_grad_() for _ in range(2))
    limit, tail = (torch.randn(shape).requires_grad_() for shape in ((5, 1), ()))
    logits, share = RowGate.apply(exact, preview, limit, tail)
    teacher = (logits + torch.randn(5, 1) * torch.randn(5, 301)).detach().to(dtype)
    teacher[2] = logits[2].detach()
    by, price = torch.randn(5), torch.randn(5)

    def learn(kl: Tensor, share: Tensor) -> list[Tensor]:
        return gradients((kl * by).sum() + (share * price).sum(), exact, preview, limit, tail)

    kl = forward_kl(logits, teacher)
    found = RoutedKL.apply(exact * 1, preview * 1, limit, tail, teacher)
    torch.testing.assert_close(found[0], kl, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[1], share) and found[0][2] == kl[2] == 0
    torch.testing.assert_close(
        learn(*found), learn(kl, share), atol=1e-5, rtol=1e-4 if dtype == torch.float32 else 0.01
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, Gemma3RMSNorm, Olmo2RMSNorm, nn.RMSNorm])
def test_rms_norms_have_their_gradient_and_their_bits(norm: type[nn.Module], dtype: torch.dtype, operators: None):
    torch.manual_seed(0)
    for width in (16, 48, 100, 576, 2048):
        model = nn.Sequential(norm(width, eps=1e-3)).to(dtype).requires_grad_(False)
        model[0].weight.normal_()
        x, by = (torch.randn(7, 30, width).to(dtype).transpose(0, 1) for _ in range(2))
        strided = torch.randn(7, width, 30).to(dtype).transpose(1, 2)
        x.requires_grad_()
        plain, other = model(x), model(strided)
        expected = gradients((plain * by).sum(), x)
        fuse_norms(model)
        assert torch.equal(model(strided), other)
        assert torch.equal(model(x), plain)
        assert (type(model(x).grad_fn).__name__ == "RMSNormBackward") == (toolchain.native(x) is not None)
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
        plain, model = norm(x), nn.Sequential(norm)
        fuse_norms(model)
        out = model(x)
        assert torch.equal(out, plain)
        assert type(out.grad_fn).__name__ != "RMSNormBackward"


def test_norms_keep_their_names_and_copies_their_weights_apart(operators: None):
    model = nn.Sequential(nn.Sequential(LlamaRMSNorm(32), nn.Linear(32, 32)), LlamaRMSNorm(32)).requires_grad_(False)
    names, norm = list(model.state_dict()), model[1]
    fuse_norms(model)
    fuse_norms(model)
    assert list(model.state_dict()) == names and type(norm) is LlamaRMSNorm and model[1].plain is norm
    x, out = torch.randn(3, 32), model(torch.ones(3, 32))
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert other[1].weight is other[1].plain.weight and other(x.bfloat16()).dtype == torch.bfloat16
    other[1].weight.zero_()
    assert torch.equal(model(torch.ones(3, 32)), out)


def test_compilers_meet_the_norm_as_it_was(operators: None):
    model = nn.Sequential(LlamaRMSNorm(32)).requires_grad_(False)
    fuse_norms(model)
    x = torch.randn(3, 32)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("name", GATED)
def test_gated_products_have_torch_s_gradient_and_keep_less_for_it(
    name: str, gains: bool, tokens: Tensor, operators: None
):
    spec = StudentSpec((RouterSpec("channel"),), gains=gains)
    student = scramble(elasticize(make_tiny(name), spec)).train(True)
    if gains:
        student.runtime.offset = (0.3, 0.0)
    kept: list[int] = []

    def learn() -> tuple[Tensor, list[Tensor]]:
        seen: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = student(tokens)[0].logits
        kept.append(sum(seen.values()))
        return out, gradients(out.square().mean(), *student.added_parameters().values())

    joined, found = learn()
    layers = [layer for layer in student.modules() if isinstance(layer, RoutedLinear)]
    assert sum(layer.multiplies for layer in layers) == 2 * len(student.blocks)
    for layer in layers:
        layer.multiplies = False
    plain, expected = learn()
    assert torch.equal(joined, plain)
    width = student.trunk.config.intermediate_size
    assert kept[1] - kept[0] == 2 * len(student.blocks) * tokens.numel() * width * plain.element_size()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "gpt2"])
def test_students_learn_from_the_same_gradients(
    name: str, tokens: Tensor, operators: None, monkeypatch: pytest.MonkeyPatch
):
    student = scramble(elasticize(make_tiny(name), SPECS["mixed-channels"])).train(True)

    def learn() -> tuple[Tensor, list[Tensor]]:
        out = student(tokens)[0].logits
        return out, gradients(out.square().mean(), *student.added_parameters().values())

    fast, found = learn()
    monkeypatch.setattr("students.student.attention_gradients", lambda *_: nullcontext())
    monkeypatch.setattr("students.kernels.norms.Trial.recipes", lambda *_: Recipes())
    plain, expected = learn()
    assert torch.equal(fast, plain)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_channels_have_the_gradient_of_index_select(dtype: torch.dtype):
    gate, members = torch.randn(2, 5, 3).to(dtype).requires_grad_(), torch.tensor([2, 0, 0, 1, 2, 2, 0])
    by = torch.randn(2, 5, 7).to(dtype)
    out = GateOfChannel.apply(gate, members)
    assert torch.equal(out, gate.index_select(-1, members))
    expected = gradients((gate.index_select(-1, members) * by).sum(), gate)
    torch.testing.assert_close(gradients((out * by).sum(), gate), expected, **CLOSE[dtype])
