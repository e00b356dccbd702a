"""Gates on channels and on rows of the LM head: values, shares, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from students.kernels.autograd import RowGate
from students.routers import selection
from tests.backends import DTYPES

CLOSE = {torch.float32: dict(atol=1e-5, rtol=1e-4), torch.bfloat16: dict(atol=0.03, rtol=0.03)}
CLOSE[torch.float16] = dict(atol=4e-3, rtol=4e-3)


def ramp(distance: Tensor, near: Tensor) -> Tensor:
    """Return 1 where the distance is at least 0, else 0, with a straight-through gradient of 1 where `near` is true."""
    soft = torch.where(near, distance, distance.detach())
    return (distance >= 0).to(distance.dtype) + (soft - soft.detach())


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [grad.float() for grad in torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(77,), (3, 1, 77)])
def test_channel_gate(shape: tuple[int, ...], dtype: torch.dtype, backend: torch.device):
    torch.manual_seed(0)
    x = torch.randn(3, 20, 77).to(backend, dtype).requires_grad_()
    log_limit = (torch.randn(shape) * 0.3 - 0.7).to(backend).requires_grad_()
    by_out, by_share = torch.randn(3, 20, 77).to(backend), torch.randn(3, 20).to(backend)
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_gate(dtype: torch.dtype, backend: torch.device):
    torch.manual_seed(0)
    exact, preview = (torch.randn(5, 301).to(backend, dtype).requires_grad_() for _ in range(2))
    limit = torch.randn(5, 1).to(backend).requires_grad_()
    tail = torch.tensor(0.3125, device=backend, requires_grad=True)
    by_out, by_share = torch.randn(5, 301).to(backend, dtype), torch.randn(5).to(backend)
    out, share = RowGate.apply(exact, preview, limit, tail)
    found = gradients((out * by_out).sum() + (share * by_share).sum(), exact, preview, limit, tail)

    keep = preview.detach() >= limit.detach().to(dtype)
    assert torch.equal(out, torch.where(keep, exact, preview + tail.to(dtype)))
    torch.testing.assert_close(share, keep.float().mean(-1))
    low, high = ((limit + shift).to(dtype) for shift in (-0.5, 0.5))
    opens = ramp(preview.detach().float() - limit, (preview >= low) & (preview < high))
    mixed = torch.where(keep, exact.float(), preview.float() + tail)
    mixed = mixed + (opens - opens.detach()) * (exact - preview - tail).detach().float()
    expected = gradients((mixed * by_out).sum() + (opens.mean(-1) * by_share).sum(), exact, preview, limit, tail)
    torch.testing.assert_close(found, expected, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tile_of_hidden_keys_leaves_numbers(dtype: torch.dtype):
    """Attention kernels take scores to base 2, a tile of keys at a time: here all keys of the first are hidden."""
    score, seen = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), torch.arange(64) >= 32
    score = score + selection.additive(seen.expand(4, -1), dtype).float()
    first, second = (score * math.log2(math.e)).split(32, 1)
    most = first.amax(1, keepdim=True)
    new = torch.maximum(most, second.amax(1, keepdim=True))
    weight = torch.cat([(first - most).exp2() * (most - new).exp2(), (second - new).exp2()], 1)
    torch.testing.assert_close(weight / weight.sum(1, keepdim=True), score.softmax(1))
