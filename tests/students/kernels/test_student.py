"""Students that run through the operators say what masks say, on every backend."""

from __future__ import annotations

import torch

from students import LoraSpec, RouterSpec, StudentSpec, elasticize
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
    for one, other in zip(skipped, outputs(student, pixels), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
