"""A kernel that fails on a GPU, or is wrong there, is replaced by its reference, with one warning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from students.kernels import reference, trial
from students.kernels.ops import OPERATORS
from students.kernels.trial import OnTrial

X, GAIN = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)), torch.ones(40)


@pytest.fixture(autouse=True)
def replaced(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(trial, "replaced", {})
    return trial.replaced


def norm(kernel: Callable[..., Any]) -> tuple[Callable[[], Tensor], list[int]]:
    """Return a call of `rms_norm` with this kernel, and the list to which the kernel's calls are added."""
    ran: list[int] = []
    tried = OnTrial("rms_norm", lambda *given: (ran.append(1), kernel(*given))[1], reference.rms_norm)
    return lambda: tried(X, GAIN, 1e-5, 1), ran


def refuse(error: Exception) -> Callable[..., Any]:
    def kernel(*given: Any) -> Any:
        raise error

    return kernel


def slightly_off(*given: Any) -> Tensor:
    return reference.rms_norm(*given) * 1.01


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (refuse(RuntimeError("out of resource: shared memory\nmore")), "out of resource: shared memory"),
        (lambda *given: reference.rms_norm(*given) * torch.nan, "its results are wrong"),
        (lambda *given: torch.zeros_like(given[0]), "its results are wrong"),
    ],
)
def test_a_kernel_that_fails_is_replaced(kernel: Callable[..., Any], reason: str, replaced: dict[str, str]) -> None:
    call, ran = norm(kernel)
    with pytest.warns(UserWarning, match=rf"^no kernel for rms_norm in float32 on cpu \({reason}\)"):
        first = call()
    assert torch.equal(first, reference.rms_norm(X, GAIN, 1e-5, 1)) and torch.equal(call(), first)
    assert len(ran) == 1 and replaced == {"rms_norm": reason}


def test_a_kernel_that_rounds_otherwise_stays(replaced: dict[str, str]) -> None:
    given, compared = (X, GAIN, 1e-5, 1), []
    tried = OnTrial("rms_norm", slightly_off, lambda *given: (compared.append(1), reference.rms_norm(*given))[1])
    for _ in range(2):
        assert torch.equal(tried(*given), slightly_off(*given))
    assert compared == [1] and not replaced


def test_large_calls_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SMALL", X.numel() - 1)
    call, _ = norm(lambda *given: torch.zeros_like(given[0]))
    assert not call().any()
    monkeypatch.setattr(trial, "SMALL", X.numel())
    with pytest.warns(UserWarning, match="its results are wrong"):
        assert call().any()


@pytest.mark.parametrize("error", [ValueError("one patch too many"), torch.OutOfMemoryError("CUDA out of memory")])
def test_errors_that_are_no_kernel_s_are_raised(error: Exception, replaced: dict[str, str]) -> None:
    call, ran = norm(refuse(error))
    for _ in range(2):
        with pytest.raises(type(error)):
            call()
    assert len(ran) == 2 and not replaced


def test_while_a_graph_is_captured_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_capturing", lambda x: True)
    call, _ = norm(lambda *given: torch.zeros_like(given[0]))
    assert not call().any()
    call, _ = norm(refuse(RuntimeError("not permitted")))
    with pytest.raises(RuntimeError, match="not permitted"):
        call()


@pytest.mark.parametrize("writes", [True, False])
def test_what_an_operator_writes_to_is_compared_too(writes: bool, replaced: dict[str, str]) -> None:
    def kernel(score: Tensor, grad: Tensor, tokens: int) -> None:
        if writes:
            reference.softmax_grad(score, grad, tokens)

    given, same = ([X.clone(), X.flip(1)] for _ in range(2))
    reference.softmax_grad(*same, 0)
    tried = OnTrial("softmax_grad", kernel, reference.softmax_grad)
    if writes:
        tried(*given, 0)
    else:
        with pytest.warns(UserWarning, match="its results are wrong"):
            tried(*given, 0)
    assert all(map(torch.equal, given, same)) and bool(replaced) != writes


def test_merged_patches_are_not_compared() -> None:
    """Every operator is one that is compared or one that chooses."""
    assert OPERATORS.keys() > trial.CHOOSE
    tried = OnTrial("merge_lowest", lambda x: x + 1, lambda x: x)
    assert torch.equal(tried(X), X + 1)


def test_choices_may_differ_where_values_are_alike() -> None:
    near = torch.tensor([1e-6, -2e-6, 1e-6])
    assert trial._agree([near.flip(0)], [near * 2], torch.ones(3))  # differences of nearly equal numbers
    assert not trial._agree([near.flip(0)], [near * 2], near)
    order = torch.arange(100)
    assert trial._agree([order.view(50, 2).flip(1).flatten()], [order], order[:1])
    assert not trial._agree([order.flip(0)], [order], order[:1])
    low = torch.tensor([0.0, -torch.inf])
    assert trial._agree([low], [low], low) and not trial._agree([low.flip(0)], [low], low)
