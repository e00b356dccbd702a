"""RMS norms: values and gradients, and that kernels sum in the order in which torch sums on GPUs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from students.kernels import norms, ops, triton
from students.kernels.norms import fuse_norms
from tests import interpreter
from tests.backends import DTYPES


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton.installed() or torch.cuda.is_available():
        pytest.skip("Triton is not installed, or runs on a GPU")
    interpreter.mend(monkeypatch)


def sum_of_squares(x: np.ndarray, rows: int) -> np.float32:
    """Return the sum of squares of x [D], one of `rows` rows, in the order in which a block of torch's threads adds."""
    most, warp = 512, 32
    power_across, power_along = (min(most, 2 ** int(np.log2(n))) for n in (len(x) // 4, rows))
    height = min(power_along, most // min(power_across, warp))
    width = min(power_across, most // height)
    across_groups = -(-len(x) // width) >= min(16 * height, 256)
    groups = height if across_groups else 1
    threads = np.zeros((groups, width), np.float32)
    for y in range(groups):
        for t in range(width):
            kept = np.zeros(4, np.float32)
            for four in range(y * width + t, len(x) // 4, groups * width):
                kept += x[4 * four : 4 * four + 4] ** 2
            threads[y, t] = ((kept[0] + kept[1]) + kept[2]) + kept[3]
    for axis in (1, 0):
        while threads.shape[axis] > 1:
            first, second = np.split(threads, 2, axis)
            threads = first + second
    return threads[0, 0]


@pytest.mark.parametrize(
    ("rows", "width"), [(1, 576), (1, 4096), (3, 768), (5, 2048), (17, 576), (2, 8192), (16, 8192)]
)
def test_sums_are_in_torch_s_order(rows: int, width: int, interpreted: None):
    from students.kernels.triton import rms_norm

    torch.manual_seed(0)
    x, weight = torch.randn(rows, width), torch.randn(width)
    out = rms_norm.rms_norm(x, weight, 1e-5, 1)
    squares = np.array([[sum_of_squares(row, rows)] for row in x[:2].numpy()])
    scale = 1 / np.sqrt(squares * (np.float32(1) / np.float32(width)) + np.float32(1e-5))
    assert np.array_equal(out[:2].numpy(), x[:2].numpy() * scale * weight.numpy())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [LlamaRMSNorm, Gemma3RMSNorm])
def test_norms_of_models_have_their_bits_on_a_gpu(norm: type[nn.Module], dtype: torch.dtype):
    for width in (576, 2048, 4096, 5120):
        model = nn.Sequential(norm(width, eps=1e-5)).to("cuda", dtype).requires_grad_(False)
        model[0].weight.normal_()
        plain = copy.deepcopy(model)
        fuse_norms(model)
        for rows in (1, 3, 7, 8, 300):
            x = torch.randn(2, rows, width).to("cuda", dtype)[:1]
            assert torch.equal(model(x), plain(x))
        exact, near = model[0].trial.recipes(model[0].plain, model[0].weight)
        assert (exact is None) != (near is None)
        model[0].routing = SimpleNamespace(rounds=True)
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), atol=1e-6, rtol=4 * torch.finfo(dtype).eps)


@torch.no_grad()
def test_norms_round_otherwise_only_where_they_may(monkeypatch: pytest.MonkeyPatch):
    """A fused norm that differs from the model's by rounding runs only where rounding is allowed.

    The test simulates a GPU on which no order of summing reproduces torch's bits."""
    plain, x = LlamaRMSNorm(100, eps=1e-5).requires_grad_(False), torch.randn(3, 100)
    model = nn.Sequential(plain)
    fuse_norms(model)
    monkeypatch.setattr(ops, "compiled", lambda x: True)
    near = norms.Recipe(0, lambda x, weight: x + weight)
    monkeypatch.setattr(model[0].trial, "recipes", lambda *_: norms.Recipes(near=near))
    assert torch.equal(model(x), plain(x))
    for rounds in (False, True):
        norms.let_round(model, SimpleNamespace(rounds=rounds))
        assert torch.equal(model(x), x + 1 if rounds else plain(x))
