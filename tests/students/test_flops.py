"""FLOPs of attention are counted for every kernel that runs it, and agree with the analytic compute model."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from torch.nn.attention import SDPBackend, sdpa_kernel

from elastic.accounting.counters import count
from students import RouterSpec, StudentSpec, elasticize
from students.flops import ATTENTION, attention_flops, flop_counter
from students.libraries import cache_of, with_cache
from tests.pico.language import make_tiny

aten = torch.ops.aten
SHAPES = [(8, 8, 16, 16), (8, 2, 16, 16), (8, 1, 1, 24), (6, 3, 5, 24)]
"""Numbers of query heads, key heads, queries and keys."""


@pytest.fixture(autouse=True)
def _old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch's own formula, which in many versions refuses fewer key heads than query heads, fail if it is used."""

    def refuse(*shapes: object) -> int:
        raise AssertionError("query/key/value shapes are incompatible")

    monkeypatch.setattr(torch.utils.flop_counter, "sdpa_flop_count", refuse)
    monkeypatch.setattr(torch.utils.flop_counter, "sdpa_backward_flop_count", refuse)


def made(heads: int, groups: int, queries: int, keys: int, **options: object) -> list[torch.Tensor]:
    shapes = (2, heads, queries, 32), (2, groups, keys, 32), (2, groups, keys, 32)
    return [torch.randn(shape, **options) for shape in shapes]


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_formulas_take_what_each_kernel_gets(sizes: tuple[int, ...], causal: bool) -> None:
    heads, _, queries, keys = sizes
    q, k, v = made(*sizes, device="meta")
    seen = sum(min(i + 1, keys) if causal else keys for i in range(queries))
    expected = 2 * 2 * heads * seen * (32 + 32)
    none, out = None, torch.empty_like(q)
    lse = torch.empty(q.shape[:-1], device="meta")
    calls = {
        aten._scaled_dot_product_flash_attention: (q, k, v, 0.0, causal, False),
        aten._scaled_dot_product_efficient_attention: (q, k, v, none, False, 0.0, causal),
        aten._scaled_dot_product_cudnn_attention: (q, k, v, none, False, 0.0, causal, False),
        aten._scaled_dot_product_fused_attention_overrideable: (q, k, v, none, 0.0, causal, False),
        aten._scaled_dot_product_flash_attention_for_cpu: (q, k, v, 0.0, causal),
    }
    places = none, none, queries, keys
    gradients = {
        aten._scaled_dot_product_flash_attention_backward: (out, q, k, v, out, lse, *places, 0.0, causal, none, none),
        aten._scaled_dot_product_efficient_attention_backward: (
            *(out, q, k, v, none, out, lse, none, none, 0.0, [True, True, True, False], causal),
        ),
        aten._scaled_dot_product_cudnn_attention_backward: (
            *(out, q, k, v, out, lse, none, none, none, *places, 0.0, causal),
        ),
        aten._scaled_dot_product_fused_attention_overrideable_backward: (
            *(out, q, k, v, none, [True, True, True, False], out, lse, *places, 0.0, causal, none, none),
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (out, q, k, v, out, lse, 0.0, causal),
    }
    for operator, arguments in calls.items():
        assert ATTENTION[operator](*arguments, scale=0.1, out_val=out) == expected, operator
    for operator, arguments in gradients.items():
        assert ATTENTION[operator](*arguments, scale=0.1, out_val=out) == 2.5 * expected, operator
    by_name = ATTENTION[aten._scaled_dot_product_flash_attention_for_cpu](query=q, key=k, value=v, is_causal=causal)
    assert by_name == expected


def test_operators_of_other_devices_are_counted_where_they_run() -> None:
    q, k, v = made(8, 2, 16, 16, device="meta")
    for operator, rest in (
        (aten._scaled_dot_product_flash_attention, (0.0, True)),
        (aten._scaled_dot_product_efficient_attention, (None, False, 0.0, True)),
        (aten._scaled_dot_product_cudnn_attention, (None, False, 0.0, True)),
    ):
        with flop_counter() as counter:
            operator(q, k, v, *rest)
        assert counter.get_total_flops() == attention_flops(q.shape, k.shape, v.shape, causal=True)


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("backend", [None, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_queries_are_counted(sizes: tuple[int, ...], backend: SDPBackend | None, causal: bool) -> None:
    q, k, v = made(*sizes)
    with nullcontext() if backend is None else sdpa_kernel(backend):
        flops, read = count(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True))
    whole = backend is SDPBackend.MATH  # computes masked scores, too
    assert flops == attention_flops(q.shape, k.shape, v.shape, causal=causal and not whole)
    assert whole or read == 4 * (q.numel() + k.numel() + v.numel())


def test_gradients_are_counted_too() -> None:
    q, k, v = made(8, 8, 16, 16, requires_grad=True)
    with flop_counter() as counter:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    assert counter.get_total_flops() == 3.5 * attention_flops(q.shape, k.shape, v.shape, causal=True)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_the_analytic_model_is_what_is_counted(name: str, attention: str, tokens: torch.Tensor) -> None:
    """With a causal kernel, a window costs as much as decoding its tokens one by one; with eager attention, every token
    is charged for all keys."""
    student = elasticize(make_tiny(name, attn_implementation=attention, sliding_window=None), StudentSpec(()))
    ones = torch.ones_like(tokens)
    flops, _ = count(lambda: student.model(tokens, use_cache=False))
    phase = "prefill" if attention == "eager" else "decode"
    assert flops == pytest.approx(2 * float(student.compute.dense(ones, phase).sum()), rel=0.01)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_decoding_step_is_what_is_counted(attention: str, tokens: torch.Tensor) -> None:
    student = elasticize(make_tiny("llama", attn_implementation=attention), StudentSpec((RouterSpec("channel"),)))
    for parameter in student.added_parameters().values():
        parameter.fill_(-1.0)
    row = tokens[:1]
    _, decisions = student(row)
    cache = cache_of(student(row[:, :-1], use_cache=True)[0])
    flops, _ = count(lambda: student.model(row[:, -1:], **with_cache(student.model, {"use_cache": True}, cache)))
    valid = torch.ones_like(row, dtype=torch.bool)
    macs = student.compute.routed_blocks(decisions, valid, "decode")[0, -1] + student.compute.head
    assert flops == pytest.approx(2 * float(macs), rel=0.01)
