"""An LM head that is exact for the rows that are needed, and reads no others."""

from __future__ import annotations

import pytest
import torch

from students.kernels import ops
from tests.backends import DTYPES


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_rows_where_the_preview_asks_for_them(rows: int, dtype: torch.dtype, backend: torch.device):
    torch.manual_seed(rows)
    x, head, preview = (torch.randn(*size).to(backend, dtype) for size in ((rows, 64), (200, 64), (rows, 200)))
    limit, tail, bias = (
        torch.linspace(-0.5, 1.5, rows).to(backend, dtype),
        torch.tensor(0.5).to(backend, dtype),
        torch.randn(200).to(backend, dtype),
    )
    logits, count = ops.exact_rows(x, head, bias, preview, limit, tail)
    needed = preview >= limit[:, None]
    expected = torch.where(needed, x.float() @ head.float().T + bias.float(), preview.float() + 0.5)
    torch.testing.assert_close(logits.float(), expected, atol=1e-4 if dtype == torch.float32 else 0.2, rtol=0.02)
    assert torch.equal(count, needed.sum(1))


@pytest.mark.parametrize("rows", [1, 2])
def test_long_lists_all_rows_and_none(rows: int, backend: torch.device):
    torch.manual_seed(0)
    x, head, preview = (torch.randn(*size).to(backend) for size in ((rows, 40), (2500, 40), (rows, 2500)))
    tail, exact = torch.tensor(-0.25).to(backend), x @ head.T
    for least in (-torch.inf, 0.0, torch.inf):
        limit = torch.full((rows,), least).to(backend)
        limit[0] = max(least, -0.5)
        logits, count = ops.exact_rows(x, head, None, preview, limit, tail)
        needed = preview >= limit[:, None]
        torch.testing.assert_close(logits, torch.where(needed, exact, preview + tail), atol=1e-4, rtol=1e-4)
        assert torch.equal(count, needed.sum(1))


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("vocabulary", [201, 2])
def test_heads_of_which_inputs_need_nearly_all(rows: int, vocabulary: int, backend: torch.device):
    torch.manual_seed(0)
    sizes = (rows, 64), (vocabulary, 64), (vocabulary,), (rows, vocabulary)
    x, head, bias, preview = (torch.randn(*size).to(backend, torch.bfloat16) for size in sizes)
    limit, tail = torch.full((rows,), -2.0).to(backend, torch.bfloat16), torch.tensor(0.5).to(backend, torch.bfloat16)
    logits, count = ops.exact_rows(x, head, bias, preview, limit, tail)
    needed = preview >= limit[:, None]
    expected = torch.where(needed, x.float() @ head.float().T + bias.float(), preview.float() + 0.5)
    torch.testing.assert_close(logits.float(), expected, atol=0.2, rtol=0.02)
    assert torch.equal(count, needed.sum(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_any_order(dtype: torch.dtype, backend: torch.device):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*size).to(backend, dtype) for size in ((70,), (90, 70), (90,)))
    close = dict(atol=1e-4 if dtype == torch.float32 else 0.15, rtol=0.02)
    for rows in ([], [89, 0, 7, 7], list(range(90))):
        chosen = torch.tensor(rows, dtype=torch.long).to(backend)
        for added in (None, bias):
            out = ops.dot_rows(x, weight, added, chosen)
            expected = weight[chosen].float() @ x.float() + (0 if added is None else added[chosen].float())
            torch.testing.assert_close(out.float(), expected, **close)
