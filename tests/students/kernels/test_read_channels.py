"""Matrix products that read the weights of the channels that they need, and of no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from students.kernels import ops, triton


def read(x: Tensor, *rest: Tensor | list[int] | None) -> tuple[Tensor, Tensor]:
    if len(x) > 1:
        return ops.few_channels(x, *rest)
    out, count = ops.read_channels(x[0], *rest)
    return out[None], count


def test_programs_put_their_counters_back(monkeypatch: pytest.MonkeyPatch):
    if not triton.installed() or torch.cuda.is_available():
        pytest.skip("Triton is not installed, or runs on a GPU")
    from students.kernels.triton import counters, read_channels

    taken = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(counters, "zeros", lambda device, count: taken)
    x, weight, limit = torch.randn(1, 512), torch.randn(512, 600), torch.full((512,), 0.5)
    first, count = read_channels.few_channels(x, limit, weight, None, None, None, [256, 600])
    again, _ = read_channels.few_channels(x, limit, weight, None, None, None, [256, 600])
    assert not taken.any() and int(count) == int((x.abs() >= 0.5).sum())
    assert torch.equal(first, again)
    torch.testing.assert_close(first, (x * (x.abs() >= 0.5)) @ weight, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("rows", [1, 4])
def test_the_same_bits_every_time_and_captured(rows: int):
    x, weight = torch.randn(rows, 4096).cuda().bfloat16(), torch.randn(4096, 6144).cuda().bfloat16()
    limit, ends = torch.full((4096,), 0.6).cuda(), [4096, 5120, 6144]
    down, up = torch.randn(48, 4096).cuda().bfloat16(), torch.randn(16, 6144).cuda().bfloat16()
    first, count = read(x, limit, weight, None, down, up, ends)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outs = [read(x, limit, weight, None, down, up, ends)[0] for _ in range(20)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, counted = read(x, limit, weight, None, down, up, ends)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, other) for other in [*outs, out]) and int(counted) == int(count)
    limit.fill_(1.2)  # the dial changes limits in place; the graph stays valid
    graph.replay()
    again, count = read(x, limit, weight, None, down, up, ends)
    assert torch.equal(out, again) and int(counted) == int(count) == int((x.abs() >= limit).any(0).sum())
