"""The first tokens of a sequence go through every branch whatever their scores, however the sequence is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from students import RouterSpec, Student, StudentSpec, elasticize
from students.libraries import cache_of
from tests.pico import image, vision_language
from tests.pico.language import make_tiny
from tests.students.test_students import scramble

PREFIX = 3
CLOSED = -1e4
"""An offset at which all other gates are closed."""


@pytest.fixture(params=[(kind, kv) for kind in ("token", "layer") for kv in ("keep", "drop")])
def student(request: pytest.FixtureRequest) -> Student:
    kind, kv = request.param
    spec = StudentSpec((RouterSpec(kind, kv=kv, prefix=PREFIX),))
    student = scramble(elasticize(make_tiny("llama"), spec)).train(False)
    student.runtime.offset = CLOSED
    return student


@torch.no_grad()
def opened(student: Student, *args: Any, **kwargs: Any) -> Tensor:
    """Return which tokens [B, T] were open, the same at every router."""
    _, decisions = student(*args, **kwargs)
    shares = torch.stack([share.expand(args[0].shape) for share in decisions.share.values()])
    assert (shares == shares[0]).all()
    return shares[0] == 1


def test_the_first_tokens_are_open_and_no_others(student: Student, tokens: Tensor) -> None:
    first = torch.arange(tokens.shape[1]) < PREFIX
    for execution in ("mask", "skip"):
        student.runtime.execution = execution
        assert torch.equal(opened(student, tokens), first.expand(tokens.shape))


def test_padding_is_not_counted(student: Student, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    first = (mask.cumsum(1) <= PREFIX)[mask.bool()]
    assert torch.equal(opened(student, tokens, mask)[mask.bool()], first)


def test_a_cache_goes_on_counting(student: Student, tokens: Tensor) -> None:
    cache, seen = None, []
    for part in tokens.split([1, 1, 4, tokens.shape[1] - 6], 1):
        with torch.no_grad():
            out, decisions = student(part, use_cache=True, past_key_values=cache)
        cache = cache_of(out)
        seen.append(next(iter(decisions.share.values())).expand(part.shape))
    assert torch.equal(torch.cat(seen, 1) == 1, opened(student, tokens))


def test_sequences_side_by_side_in_one_row_have_a_prefix_each(tokens: Tensor) -> None:
    spec = StudentSpec((RouterSpec("token", prefix=PREFIX),))
    student = scramble(elasticize(make_tiny("llama"), spec)).train(False)
    student.runtime.offset = CLOSED
    positions = torch.cat([torch.arange(5), torch.arange(tokens.shape[1] - 5)])[None]
    assert torch.equal(opened(student, tokens[:1], position_ids=positions), positions < PREFIX)


def test_training_opens_them_and_gives_them_no_gradient(tokens: Tensor) -> None:
    student = scramble(elasticize(make_tiny("llama"), StudentSpec((RouterSpec("token", prefix=99),)))).train()
    student(tokens)[0].logits.square().sum().backward()
    grads = [p.grad for p in student.added_parameters().values()]
    assert all(grad is None or not grad.any() for grad in grads)


@pytest.mark.parametrize(
    "settings", [{"selection": "topk"}, {"granularity": "sequence"}, {"network": "static"}, {"kind": "head"}]
)
def test_prefix_without_effect_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="prefix"):
        RouterSpec(**{"kind": "token", "prefix": 1, **settings})


def test_image_models_have_no_prefix_of_ones_own() -> None:
    with pytest.raises(ValueError, match="prefix"):
        elasticize(image.make_tiny("timm_plain"), StudentSpec((RouterSpec("token", kv="drop", prefix=1),)))


def test_prefix_is_refused_where_image_tokens_stay_outside() -> None:
    spec = StudentSpec((RouterSpec("image"), RouterSpec("token", prefix=1)))
    with pytest.raises(ValueError, match="prefix"):
        elasticize(vision_language.make_vlm("llava"), spec)
