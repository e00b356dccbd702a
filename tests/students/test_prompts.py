"""Recorded prefill of prompts with images: it gives what the model gives, and its recorded part does not wait."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from students import RouterSpec
from students.families.vision_language import VisionLanguageStudent
from students.kernels.capture import KEPT
from students.libraries import cache_of
from students.recording.decoding import Decoding
from students.recording.prompt import MULTIPLE
from tests.pico.vision_language import CONFIGS, HYBRID, make_prompts, make_vlm
from tests.students.host_waits import Launches, NoHostWaits
from tests.students.tape import Tape
from tests.students.test_vision_language import PER_KIND, PRUNING, student_of

pytestmark = pytest.mark.usefixtures("no_gradients")

OPTIONS = dict(do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
FOUR = dict(OPTIONS, max_new_tokens=4, min_new_tokens=4)
CLOSE = dict(atol=1e-4, rtol=1e-4)
WHOLE = sorted(set(CONFIGS) - {"paligemma2", "gemma3", "cohere2_vision", "aya_vision", *HYBRID})
"""All classes but those whose layers have sliding windows or keep a state."""
ALIKE = ("llava", "paligemma", "internvl")
"""Classes whose image inputs are pixels of one shape alone, so that the vision tower is recorded, too."""


def recorded(student: VisionLanguageStudent | Decoding, inputs: dict[str, Tensor], **options: Any) -> tuple[Any, int]:
    """Generate with a `Tape` as recorder, without warnings; return the output and the number of recorded prompts."""
    decoding = getattr(student, "_decoding", student)
    decoding.recorder = Tape
    with warnings.catch_warnings(action="error"):
        out = student.generate(**inputs, **{**FOUR, **options})
    return out, len(decoding._prompts.kept)


def same(one: Any, other: Any) -> None:
    """Assert that two outputs of `generate` have the same tokens and close logits."""
    assert torch.equal(one.sequences, other.sequences)
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), **CLOSE)


def longer(inputs: dict[str, Tensor], more: int) -> dict[str, Tensor]:
    """Return prompts with `more` further words at the end."""
    text = {name: F.pad(x, (0, more), value=1) for name, x in inputs.items() if x.shape == inputs["input_ids"].shape}
    return {**inputs, **text, "input_ids": F.pad(inputs["input_ids"], (0, more), value=7)}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_read_and_said(name: str) -> None:
    """Recorded prompts give the tokens, logits and cache lengths of plain ones, for students and their teachers."""
    student = student_of(name, PRUNING, RouterSpec("channel"))
    for number, images in enumerate((PER_KIND.get(name, (2, 1)), (1,)), 1):
        inputs = make_prompts(student.model, images, left=True)
        plain = student.model.generate(**inputs, **FOUR)
        out, made = recorded(student, inputs)
        same(out, plain)
        assert made == number and bool(student._decoding._prompts.tower.kept) == (name in ALIKE)
        assert cache_of(out).get_seq_length() == cache_of(plain).get_seq_length() < plain.sequences.shape[1] - 1
        with student.teacher():
            same(recorded(student, inputs)[0], student.model.generate(**inputs, **FOUR))
        del student._decoding._prompts.kept[next(reversed(student._decoding._prompts.kept))]


@pytest.mark.parametrize("name", WHOLE)
def test_a_frozen_model(name: str) -> None:
    model = make_vlm(name)
    decoding = Decoding(model, model.get_decoder())
    for images in (PER_KIND.get(name, (2, 1)), (1,)):
        inputs = make_prompts(model, images, left=True)
        same(recorded(decoding, inputs)[0], model.generate(**inputs, **FOUR))


@pytest.mark.parametrize("router", [PRUNING, RouterSpec("channel")])
@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_padding_is_hidden_where_all_images_pass(name: str, router: RouterSpec) -> None:
    student = student_of(name, router, keep=1.0)
    inputs = make_prompts(student.model, (2, 1), left=True)
    text = {name: F.pad(x, (5, 0)) for name, x in inputs.items() if x.shape == inputs["input_ids"].shape}
    out, made = recorded(student, {**inputs, **text})
    same(out, student.model.generate(**{**inputs, **text}, **FOUR))
    assert made == 1


def test_the_length_may_differ_a_little() -> None:
    student = student_of("llava")
    inputs = make_prompts(student.model, (1, 1), left=True)
    for more in range(4):
        this = longer(inputs, more)
        out, made = recorded(student, this)
        same(out, student.model.generate(**this, **FOUR))
        assert this["input_ids"].shape[1] < 2 * MULTIPLE and made == 1
    assert recorded(student, longer(inputs, MULTIPLE))[1] == 2


def test_the_dial_turns() -> None:
    student = student_of("llava")
    inputs = make_prompts(student.model, (1,))
    lengths = []
    for offset in (0.0, 0.2, 0.0, float("inf")):
        student.runtime.offset, student.runtime.bypass = offset, offset == float("inf")
        out, made = recorded(student, inputs)
        same(out, student.model.generate(**inputs, **FOUR))
        lengths.append((cache_of(out).get_seq_length(), made))
    assert [made for _, made in lengths] == [1, 2, 2, 3] and lengths[0] == (lengths[2][0], 1)
    assert lengths[0][0] < lengths[1][0] < lengths[3][0]
    student.runtime.bypass, student.runtime.offset = False, 0.0
    student.image_router.set_quota(torch.linspace(-0.3, 0.7, 100))
    assert cache_of(recorded(student, inputs)[0]).get_seq_length() > lengths[0][0]
    assert len(student._decoding._prompts.kept) == KEPT


def test_routers_in_the_tower() -> None:
    student = student_of("llava", PRUNING, RouterSpec("token", part="vision", kv="drop", selection="quota"))
    for router in student.vision.routers():
        router.router.set_quota(torch.linspace(-0.5, 0.5, 50))
    inputs = make_prompts(student.model, (1, 1), left=True)
    for offset in (0.0, 0.3):
        student.runtime.offset = offset
        out, _ = recorded(student, inputs)  # before another pass sets the tower's offset
        same(out, student.model.generate(**inputs, **FOUR))
    assert len(student._decoding._prompts.tower.kept) == 2


@pytest.mark.parametrize(
    ("router", "offset"), [(RouterSpec("image", selection="threshold"), 0.0), (PRUNING, (0.0, 0.4))]
)
def test_what_depends_on_the_images_is_read_as_ever(router: RouterSpec, offset: Any) -> None:
    student = student_of("llava", router)
    student.runtime.offset = offset
    inputs = make_prompts(student.model, (1, 1), left=True)
    plain = student.model.generate(**inputs, **FOUR)
    student._decoding.recorder = Tape
    with pytest.warns(UserWarning, match="^prompts without recorded passes: how many image tokens pass depends"):
        same(student.generate(**inputs, **FOUR), plain)
    same(recorded(student, inputs)[0], plain)  # no second warning
    assert not student._decoding._prompts.kept and student._decoding._steps


def test_several_answers_one_token_and_a_wrong_prompt() -> None:
    student = student_of("llava")
    inputs = make_prompts(student.model, (1, 1), left=True)
    for options in (dict(num_return_sequences=2), dict(num_return_sequences=3, max_new_tokens=1, min_new_tokens=1)):
        made = []
        for work in (student.model.generate, lambda **kwargs: recorded(student, {}, **kwargs)[0]):
            torch.manual_seed(3)
            made.append(work(**inputs, **FOUR | options | dict(do_sample=True)))
        same(*made)
    one, _ = recorded(student, inputs, max_new_tokens=1, min_new_tokens=1)
    held = cache_of(one).elastic.held.clone()
    recorded(student, {**inputs, "pixel_values": inputs["pixel_values"].flip(0)})  # overwrites the recorded pass
    assert torch.equal(cache_of(one).elastic.held, held)
    assert cache_of(one).get_seq_length() == held.shape[1] < inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match="do not match"):
        recorded(student, {**inputs, "pixel_values": inputs["pixel_values"][:1]})


@pytest.mark.parametrize("name", ALIKE)
def test_it_is_read_again_and_again(name: str) -> None:
    """A prompt's reader gives the same bits in each call, and the vision tower's recorded pass never waits."""
    student = student_of(name)
    inputs = make_prompts(student.model, (1, 1), left=True)
    student._decoding.recorder = Tape
    read = student.reader(**inputs)
    first = read().logits.clone()
    torch.testing.assert_close(first, student.model.generate(**inputs, **FOUR).logits[0], **CLOSE)
    assert torch.equal(read().logits, first)
    with NoHostWaits():
        tower = student._decoding._prompts.tower(inputs["pixel_values"])
    assert len(tower) == 2


def test_the_image_router_asks_once() -> None:
    """Between the trunk and its first block, the host waits once, to learn which image tokens are kept."""
    student = student_of("llava")
    inputs = {**make_prompts(student.model, (1, 1)), "attention_mask": None}
    student.model(**inputs, use_cache=True)
    counter, waits = Launches(), []
    for module in (student.trunk, student.trunk.layers[0]):
        module.register_forward_pre_hook(lambda *_: waits.append(list(counter.waits)), prepend=True)
    with counter:
        student.model(**inputs, use_cache=True)
    assert waits[1][len(waits[0]) :] == ["tolist"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", WHOLE)
def test_cuda_graphs_read_what_the_model_reads(name: str) -> None:
    student = student_of(name, PRUNING, RouterSpec("channel")).to("cuda")
    inputs = {key: tensor.to("cuda") for key, tensor in make_prompts(student.model, (1, 1), left=True).items()}
    for bypass in (False, True):
        student.runtime.bypass = bypass
        plain, out = (work(**inputs, **FOUR) for work in (student.model.generate, student.generate))
        assert student._decoding._prompts.kept and torch.equal(out.sequences, plain.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), atol=2e-3, rtol=2e-3)
