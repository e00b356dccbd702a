"""Invariants of the divergences, on small random tensors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losses import (
    DIVERGENCES,
    HIDDEN_DISTANCES,
    chunked,
    default_chunk_rows,
    forward_kl,
    jensen_shannon,
    mean_divergence,
    per_layer,
    top_of,
    topk_bce,
    topk_kl,
    topk_kl_to,
)

KINDS = pytest.mark.parametrize("kind", DIVERGENCES)


def logits(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return student logits that require grad and teacher logits."""
    student = torch.randn(shape, dtype=dtype) * scale
    return student.requires_grad_(), torch.randn(shape, dtype=dtype) * scale


# Plain formulas, whose gradients are autograd's.


def plain_kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of each row of probabilities."""
    return (p * (p.log() - q.log())).sum(-1)


def plain_jensen_shannon(p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * plain_kl(p, m) + (1 - beta) * plain_kl(q, m)


def plain_topk_kl(p: Tensor, q: Tensor, k: int) -> Tensor:
    top = p.topk(k).indices
    p, q = (torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (p, q))
    return plain_kl(p, q)


PLAIN: list[tuple[str, dict[str, float], Callable[[Tensor, Tensor], Tensor]]] = [
    ("forward_kl", {}, plain_kl),
    ("reverse_kl", {}, lambda p, q: plain_kl(q, p)),
    ("jensen_shannon", {}, plain_jensen_shannon),
    ("jensen_shannon", {"beta": 0.2}, lambda p, q: plain_jensen_shannon(p, q, 0.2)),
    ("jensen_shannon", {"beta": 0.0}, plain_kl),
    ("jensen_shannon", {"beta": 1.0}, lambda p, q: plain_kl(q, p)),
    ("topk_kl", {"k": 4}, lambda p, q: plain_topk_kl(p, q, 4)),
    ("topk_kl", {"k": 1}, lambda p, q: plain_topk_kl(p, q, 1)),
    ("topk_kl", {"k": 50}, plain_kl),  # more than there are
]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize(("kind", "options", "plain"), PLAIN)
def test_value_and_gradient_are_those_of_the_plain_formula(
    kind: str, options: dict[str, float], plain: Callable[[Tensor, Tensor], Tensor], temperature: float
) -> None:
    student, teacher = logits(2, 5, 11)
    value = mean_divergence(student, teacher, kind=kind, temperature=temperature, **options)
    (gradient,) = torch.autograd.grad(3 * value, student)
    rows = plain((teacher / temperature).softmax(-1), (student / temperature).softmax(-1))
    expected = temperature**2 * rows.mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * expected, student)[0])


@pytest.mark.parametrize(("kind", "options", "plain"), PLAIN)
def test_rows_may_be_weighted(kind: str, options: dict[str, float], plain: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = logits(6, 11)
    weights = torch.randn(6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(DIVERGENCES[kind](student, teacher, **options) @ weights, student)
    expected = plain(teacher.softmax(-1), student.softmax(-1)) @ weights
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


@KINDS
def test_zero_with_zero_gradient_at_equality(kind: str) -> None:
    student, _ = logits(4, 9, dtype=torch.float32)
    value = mean_divergence(student, student.detach().clone(), kind=kind)
    value.backward()
    torch.testing.assert_close(value, torch.zeros(()), atol=1e-6, rtol=0)
    torch.testing.assert_close(student.grad, torch.zeros(4, 9), atol=1e-6, rtol=0)


@KINDS
def test_extreme_logits_stay_finite(kind: str) -> None:
    student, teacher = logits(6, 200, dtype=torch.float32, scale=200.0)
    value = mean_divergence(student, teacher, kind=kind)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(kind: str, dtype: torch.dtype) -> None:
    student, teacher = (x.detach().to(dtype) for x in logits(6, 40))
    results = []
    for wide in (dtype, torch.float32):
        leaf = student.to(wide).detach().requires_grad_()
        value = mean_divergence(leaf, teacher.to(wide), kind=kind)
        value.backward()
        assert leaf.grad.dtype == wide
        assert value.dtype == torch.float32
        results.append((value, leaf.grad.float()))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=1e-5)


@KINDS
def test_masked_rows_have_no_effect(kind: str) -> None:
    student, teacher = logits(3, 4, 9)
    mask = torch.rand(3, 4) < 0.5
    value = mean_divergence(student, teacher, mask, kind=kind)
    value.backward()
    torch.testing.assert_close(value, mean_divergence(student[mask], teacher[mask], kind=kind))
    assert (student.grad[~mask] == 0).all()
    assert (student.grad[mask] != 0).any()
    with torch.no_grad():
        student[~mask], teacher[~mask] = math.nan, math.inf
    student.grad = None
    broken = mean_divergence(student, teacher, mask, kind=kind)
    broken.backward()
    assert broken == value
    assert student.grad.isfinite().all()


@KINDS
def test_no_counted_row_gives_zero(kind: str) -> None:
    student, teacher = logits(3, 9)
    value = mean_divergence(student, teacher, torch.zeros(3, dtype=torch.bool), kind=kind)
    value.backward()
    assert value == 0
    assert (student.grad == 0).all()


@KINDS
@pytest.mark.parametrize("masked", [False, True])
def test_chunk_size_changes_nothing(kind: str, masked: bool) -> None:
    student, teacher = logits(10, 9)
    mask = torch.arange(10) % 3 > 0 if masked else None
    results = []
    for chunk_rows in (1, 3, 10, 99, None):
        value = mean_divergence(student, teacher, mask, kind=kind, chunk_rows=chunk_rows)
        results.append((value, *torch.autograd.grad(value, student)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


# The LM head inside the chunks.


def head_loss(weight: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def chunk_loss(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        s, t = F.linear(student, weight), F.linear(teacher, weight.detach())
        return forward_kl(s, t).sum(), torch.stack([(s.argmax(-1) == t.argmax(-1)).sum(), s.new_tensor(len(s)).long()])

    return chunk_loss


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_chunked_equals_its_function_on_all_rows(chunk_rows: int, masked: bool) -> None:
    hidden, teacher = logits(10, 5)
    weight = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(10) % 4 > 0 if masked else None
    loss, statistics = chunked(head_loss(weight), [hidden, teacher], [weight], chunk_rows=chunk_rows, mask=mask)
    gradients = torch.autograd.grad(loss / 7, [hidden, weight])
    whole = slice(None) if mask is None else mask
    expected, expected_statistics = head_loss(weight)(hidden[whole], teacher[whole])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(statistics, expected_statistics)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected / 7, [hidden, weight]))


def test_chunked_only_evaluates_where_no_gradient_is_wanted() -> None:
    hidden, teacher = logits(10, 5)
    weight = torch.randn(9, 5, dtype=torch.float64)
    expected = chunked(head_loss(weight), [hidden, teacher], chunk_rows=3)
    with torch.no_grad():
        loss, statistics = chunked(head_loss(weight), [hidden, teacher], chunk_rows=3)
    assert not loss.requires_grad
    assert not statistics.requires_grad
    torch.testing.assert_close((loss, statistics), expected)
    assert not chunked(head_loss(weight), [hidden.detach(), teacher], chunk_rows=3)[0].requires_grad


def test_chunked_parameters_add_up_in_float32() -> None:
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    ones = torch.ones(1000, 1, dtype=torch.bfloat16)
    loss, _ = chunked(lambda x: ((x * weight).sum(), torch.zeros(0)), [ones], [weight], chunk_rows=1)
    loss.backward()
    assert weight.grad == 1000  # in bfloat16, a sum of ones stops at 256


def test_a_second_backward_fails_instead_of_giving_scaled_gradients() -> None:
    student, teacher = logits(4, 9)
    value = mean_divergence(student, teacher)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


class LargestResult(TorchDispatchMode):
    """A mode that records the size of the largest float32 tensor that an operation returned, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.numel())
        return result


N, V, CHUNK = 48, 512, 8


def watched(run: Callable[[], Tensor]) -> int:
    with LargestResult() as largest:
        run().backward()
    return largest.elements


@KINDS
def test_no_float32_copy_of_the_logits(kind: str) -> None:
    student, teacher = logits(4, 12, V, dtype=torch.bfloat16)
    assert watched(lambda: mean_divergence(student, teacher, kind=kind, chunk_rows=CHUNK)) <= CHUNK * V
    mask = torch.rand(4, 12) < 0.9
    assert watched(lambda: mean_divergence(student, teacher, mask, kind=kind, chunk_rows=CHUNK)) <= CHUNK * V
    plain = watched(lambda: F.cross_entropy(student.flatten(0, 1).float(), torch.randint(V, (N,))))
    assert plain == N * V, "the watch must see what it looks for"


def test_no_logits_at_all_with_the_head_inside() -> None:
    hidden, teacher = logits(N, 4, dtype=torch.float32)
    weight = torch.randn(V, 4)
    assert watched(lambda: chunked(head_loss(weight), [hidden, teacher], chunk_rows=CHUNK)[0]) <= CHUNK * V


def test_row_functions_work_in_blocks_of_their_own() -> None:
    rows, vocabulary = 64, 131072  # 32 MB in float32
    student, teacher = logits(rows, vocabulary, dtype=torch.bfloat16)
    assert watched(lambda: forward_kl(student, teacher).sum()) <= rows * vocabulary // 2


def test_default_chunk_fits_the_vocabulary() -> None:
    cpu = torch.device("cpu")
    assert default_chunk_rows(49152, torch.float32, cpu) * 49152 * 4 <= 16 * 2**20
    assert default_chunk_rows(49152, torch.bfloat16, cpu) > default_chunk_rows(49152, torch.float32, cpu) > 64
    assert default_chunk_rows(10**9, torch.float32, cpu) == 1
    gpu = torch.device("cuda")
    assert [default_chunk_rows(v, torch.bfloat16, gpu) for v in (128256, 10**6, 10**9)] == [1024, 128, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: mean_divergence(s, t, kind="kl"), "unknown divergence 'kl'; there are forward_kl"),
        (lambda s, t: mean_divergence(s, t[:, :-1]), "one shape"),
        (lambda s, t: mean_divergence(s, t[:-1]), "but teacher"),
        (lambda s, t: mean_divergence(s, t, torch.ones(3, dtype=torch.bool)), "mask"),
        (lambda s, t: mean_divergence(s, t, temperature=0.0), "temperature must be positive"),
        (lambda s, t: jensen_shannon(s, t, beta=1.5), "beta must lie"),
        (lambda s, t: topk_kl(s, t, k=0), "k must be"),
        (lambda s, t: chunked(forward_kl, [s, t[:-1]], chunk_rows=2), "same number of rows"),
        (lambda s, t: chunked(forward_kl, [s, t], chunk_rows=0), "chunk_rows"),
        (lambda s, t: topk_bce(s, 7), "share must lie"),
        (lambda s, t: per_layer(HIDDEN_DISTANCES["mse"], [s], []), "as many student as teacher layers"),
    ],
)
def test_errors_say_what_was_given(call: Callable[[Tensor, Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*logits(4, 9))


@pytest.mark.parametrize("k", [1, 4, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_kl_to_what_was_kept_of_the_teacher(k: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 11, generator=draw, dtype=torch.float32).to(dtype) for _ in range(2))
    both = student.clone().requires_grad_(), student.clone().requires_grad_()
    masses, tokens = top_of(teacher, k=k, temperature=2.0)
    assert masses.shape == (7, min(k, 11) + 1) and tokens.dtype == torch.int32 and masses.dtype == torch.float32
    torch.testing.assert_close(masses.exp().sum(1), torch.ones(7))
    values = topk_kl(both[0], teacher, k=k, temperature=2.0), topk_kl_to(both[1], masses, tokens, temperature=2.0)
    assert torch.equal(*values)
    for value in values:
        value.sum().backward()
    assert torch.equal(both[0].grad, both[1].grad)
    with pytest.raises(ValueError, match="temperature must be positive"):
        topk_kl_to(student, masses, tokens, temperature=0.0)
