"""Students that skip through the operators give the outputs of mask execution, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from students import LoraSpec, RouterSpec, StudentSpec, elasticize
from students.kernels import triton
from students.kernels.rotary import Rotary
from students.kernels.triton import tuning
from students.libraries import cache_of, with_cache
from tests.pico.language import make_tiny
from tests.students.test_execution import decode
from tests.students.test_image import outputs, routed
from tests.students.test_students import scramble

SPEC = StudentSpec((RouterSpec("channel"), RouterSpec("vocab", rank=5)), LoraSpec(2))


@torch.no_grad()
def test_decoding_says_what_masks_say(tokens: torch.Tensor, backend: torch.device):
    student = scramble(elasticize(make_tiny("llama", num_hidden_layers=2), SPEC)).train(False).to(backend)
    student.runtime.capacity = 0.5
    row, prompt = tokens[:1, :8].to(backend), torch.arange(8).to(backend)[None] < 6
    student.runtime.execution = "mask"
    whole = student(row, prompt=prompt)[0].logits
    student.runtime.execution = "skip"
    torch.testing.assert_close(whole, decode(student, row, None, 6), atol=1e-3, rtol=2e-3)


@torch.no_grad()
def test_images_that_merge_patches_say_what_masks_say(backend: torch.device):
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 16, 16, generator=draw)
    student, pixels = routed("vit", "block merges", pixels).to(backend), pixels.to(backend)
    skipped = outputs(student, pixels)
    student.runtime.execution = "mask"
    torch.testing.assert_close(skipped, outputs(student, pixels), rtol=1e-3, atol=1e-3)


class Called(TorchDispatchMode):
    """A mode that records the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.skipif(not triton.installed(), reason="Triton is not installed")
def test_decoding_on_a_gpu_asks_nothing_of_it(rows: int, monkeypatch: pytest.MonkeyPatch):
    """A decoding step on a GPU does not make the host wait: on fake tensors, which hold no values, waiting fails."""
    monkeypatch.setattr(tuning, "capability", lambda device: 90)
    monkeypatch.setattr(triton, "_launches", [True])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Rotary, "_agrees", lambda *_: True)  # reads values, in its first call
    student = scramble(elasticize(make_tiny("llama"), SPEC)).train(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in student.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
        row = torch.ones(rows, 6, dtype=torch.long, device="cuda")
        cache = cache_of(student(row, use_cache=True)[0])
        with Called() as called:
            out, _ = student(row[:, :1], use_cache=True, past_key_values=cache)
        options = with_cache(student.model, {"use_cache": True}, cache_of(out))
        again = student.model(row[:, :1], **options)  # without recording decisions
    assert out.logits.is_cuda and again.logits.is_cuda
    assert {"read_channels" if rows == 1 else "few_channels", "exact_rows"} <= called.names
