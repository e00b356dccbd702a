"""Images in front of hybrid models: image tokens that stay outside, and padding, leave no trace in a state."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from students import RouterSpec
from students.execution.kv_cache import keeps_state, states_of
from students.execution.mixer import GatedMixer
from students.families.vision_language import VisionLanguageStudent
from students.libraries import cache_of
from tests.pico.vision_language import IMAGE_TOKEN, make_prompts
from tests.students.tape import Tape
from tests.students.test_prompts import FOUR
from tests.students.test_vision_language import PRUNING, one, student_of

CLOSE = dict(atol=1e-4, rtol=1e-4)
KINDS = {
    "image": (PRUNING,),
    "threshold": (RouterSpec("image", selection="threshold", query=4),),
    "tokens": (PRUNING, RouterSpec("token", substitute=3), RouterSpec("layer"), RouterSpec("channel")),
    "dropped": (PRUNING, RouterSpec("token", kv="drop"), RouterSpec("head"), RouterSpec("vocab", rank=5)),
}


def states(student: VisionLanguageStudent, inputs: dict[str, Any]) -> list[Tensor]:
    """Return the states that a prompt leaves in the cache."""
    return states_in(cache_of(student(**inputs, use_cache=True)[0]))


def states_in(cache: Any) -> list[Tensor]:
    return [state for layer in cache.layers if keeps_state(layer) for *_, state in states_of(layer)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_stays_outside_is_in_no_state(kind: str) -> None:
    """Skipping and masking, with and without a cache, leave the same states, and padding is not in them."""
    student = student_of("qwen3_5", *KINDS[kind])
    inputs = make_prompts(student.model, (1, 1), left=True)
    out, decisions = student(**inputs)
    assert out.logits.shape[1] < inputs["input_ids"].shape[1] and not bool(inputs["attention_mask"].all())
    skipped, alone = states(student, inputs), states(student, one(inputs, 0))
    torch.testing.assert_close([state[:1] for state in skipped], alone, **CLOSE)
    student.runtime.execution = "mask"
    rows = decisions.index.unsqueeze(-1).expand(-1, -1, out.logits.shape[-1])
    for kept in (False, True) if kind != "dropped" else (False,):  # with `drop`, masks take no cache
        masked = student(**inputs, use_cache=kept)[0].logits.gather(1, rows)
        torch.testing.assert_close(out.logits[decisions.valid], masked[decisions.valid], **CLOSE)
    if kind != "dropped":
        torch.testing.assert_close(skipped, states(student, inputs), **CLOSE)


@torch.no_grad()
def test_the_state_is_that_of_the_tokens_that_are_left() -> None:
    """It is what the frozen language model keeps of the open tokens' embeddings at their positions."""
    student, given = student_of("qwen3_5"), {}
    inputs = make_prompts(student.model, (1,))
    student.trunk.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(kwargs), with_kwargs=True, prepend=True
    )
    out, decisions = student(**inputs)
    embeds, places = given["inputs_embeds"], given["position_ids"]
    index = decisions.index[0]
    assert len(index) < embeds.shape[1] == inputs["input_ids"].shape[1]
    with student.teacher():
        alone = dict(inputs_embeds=embeds[:, index], position_ids=places[..., index], use_cache=True)
        left = student.trunk(**alone)
        assert torch.equal(student.model.lm_head(left.last_hidden_state), out.logits)
    torch.testing.assert_close(states_in(cache_of(left)), states(student, inputs), **CLOSE)


@pytest.mark.parametrize("padded", [False, True])
def test_training_sees_what_skipping_computes(padded: bool) -> None:
    """With gradients, too, closed image tokens are in no state; open and closed ones have a gradient."""
    student = student_of("qwen3_5", PRUNING, RouterSpec("token", sites=("mlp",)))
    inputs = make_prompts(student.model, (1, 1))
    inputs = inputs if padded else one(inputs, 1)
    with torch.no_grad():
        out, decisions = student(**inputs)
    learning, again = student(**inputs)
    assert torch.equal(decisions.share["image"], again.share["image"])
    rows = learning.logits.gather(1, decisions.index.unsqueeze(-1).expand(-1, -1, out.logits.shape[-1]))
    torch.testing.assert_close(out.logits[decisions.valid], rows[decisions.valid], **CLOSE)
    image = inputs["input_ids"] == IMAGE_TOKEN
    (gradient,) = torch.autograd.grad(learning.logits[:, -3:].logsumexp(-1).sum(), again.share["image"])
    assert bool(gradient[image].all()) and set(again.share["image"][image].tolist()) == {0.0, 1.0}


@torch.no_grad()
def test_reported_compute_is_what_torch_counts() -> None:
    """What torch counts of convolutions and states depends on the implementation: both are left out."""
    for routers in ((PRUNING,), (PRUNING, RouterSpec("token", sites=("mlp",)))):
        student = student_of("qwen3_5", *routers)
        inputs = make_prompts(student.model, (1,))
        _, decisions = student(**inputs)
        valid, tokens = inputs["attention_mask"].bool(), decisions.valid.shape[1]
        macs, _, dense = student.spent(decisions, inputs["input_ids"] == IMAGE_TOKEN, valid, tokens)
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            student(**inputs)
        mixers = [name for name, module in student.named_modules() if isinstance(module, GatedMixer)]
        counts = [counter.get_flop_counts()[f"{type(student).__name__}.{name}"] for name in mixers]
        other = sum(count[torch.ops.aten.bmm] + count[torch.ops.aten.convolution] for count in counts)
        state = len(mixers) * tokens * (3 * 4 * 8 * 6 + 4 * 56)
        assert 2 * (float(macs) - state) == pytest.approx(counter.get_total_flops() - other, rel=0.002)
        assert float(macs) < float(dense)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
@torch.no_grad()
def test_decoding_is_recorded_and_the_prompt_is_not(name: str) -> None:
    student = student_of(name, PRUNING, RouterSpec("channel"))
    options = {**FOUR, "return_dict_in_generate": False, "output_logits": False}
    inputs = make_prompts(student.model, (2, 1), left=True)
    plain = student.model.generate(**inputs, **options)
    student._decoding.recorder = Tape
    with pytest.warns(UserWarning, match="^prompts without recorded passes: .* a state in place of keys and values"):
        assert torch.equal(student.generate(**inputs, **options), plain)
    with warnings.catch_warnings(action="error"):
        assert torch.equal(student.generate(**inputs, **options), plain)
        with student.teacher():
            expected = student.model.generate(**inputs, **options)
            assert torch.equal(student.generate(**inputs, **options), expected)
    assert student._decoding._steps and not student._decoding._prompts.kept
