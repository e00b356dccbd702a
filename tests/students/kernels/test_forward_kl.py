"""The forward KL of a training step, computed in one pass over the logits where there is a kernel."""

from __future__ import annotations

import pytest
import torch

from elastic.config import LossConfig
from elastic.objectives.sums import divergence_of
from losses import forward_kl
from tests.backends import DTYPES

divergence = divergence_of(LossConfig())


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_kl_of_training_is_that_of_losses(dtype: torch.dtype, backend: torch.device):
    torch.manual_seed(0)
    student, teacher = ((torch.randn(7, 1234) * scale).to(backend, dtype) for scale in (3, 4))
    student[0, 3] = teacher[0, 3] = 300.0  # probability 1; all others underflow
    student[1] = teacher[1]
    student.requires_grad_()
    by = torch.randn(7).to(backend)
    found, expected = divergence(student, teacher), forward_kl(student, teacher)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-5)
    assert found[1] == 0
    (a,), (b,) = (torch.autograd.grad((value * by).sum(), student) for value in (found, expected))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 0.01)


def test_forward_kl_of_training_tells_of_what_is_not_finite(backend: torch.device):
    logits = torch.zeros(2, 64).to(backend)
    logits[0, 5] = torch.nan
    for teacher in (torch.zeros(2, 64).to(backend), logits):
        assert divergence(logits, teacher).isnan().tolist() == [True, False]
