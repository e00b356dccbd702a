"""Recorded decode steps of routers that decide anew for every token: gates are masks on the device, and kernels read no
weights of what they close."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from students import LoraSpec, RouterSpec, StudentSpec
from students.execution.kv_cache import DroppedLayer
from students.families.language import LanguageStudent
from students.kernels import devices
from students.libraries import cache_of, with_cache
from students.recording import decoding
from students.recording.step import DecodeStep
from tests.pico.vision_language import make_prompts
from tests.students.tape import Tape
from tests.students.test_decoding import CLOSE, SIX, SIX_LOGITS, student_for
from tests.students.test_packing import add_corrections
from tests.students.test_vision_language import student_of

pytestmark = pytest.mark.usefixtures("no_gradients")

ROUTERS = {
    "token": StudentSpec((RouterSpec("token"),)),
    "token-substitute-lora": StudentSpec((RouterSpec("token", substitute=2, network="mlp"),), LoraSpec(2)),
    "token-weighted-prefix": StudentSpec((RouterSpec("token", weight="score", prefix=3),)),
    "token-drop": StudentSpec((RouterSpec("token", kv="drop", substitute=2),)),
    "token-static-drop": StudentSpec((RouterSpec("token", kv="drop", network="static"),)),
    "layer": StudentSpec((RouterSpec("layer", substitute=2),)),
    "layer-drop": StudentSpec((RouterSpec("layer", kv="drop", blocks="odd", weight="score"),)),
    "elastiformer": StudentSpec(
        tuple(
            RouterSpec(kind, selection="topk", weight="score", **more)
            for kind, more in (("token", {}), ("head", {}), ("expert", {"groups": 4}))
        )
    ),
    "head": StudentSpec((RouterSpec("head"), RouterSpec("expert", groups=6)), LoraSpec(2)),
    "neuron": StudentSpec((RouterSpec("neuron"),)),
    "token-channel": StudentSpec((RouterSpec("token"), RouterSpec("channel"), RouterSpec("vocab", rank=5))),
}
BEHIND = "token-substitute-lora", "layer-drop", "elastiformer"
"""Routers that are also tested as on devices that the host does not run ahead of."""
ANEW = "elastiformer", "token-static-drop"
"""Routers whose choice is part of a recording: turning the dial records anew."""
COMPILED = "token", "token-drop", "layer", "elastiformer", "neuron"
CASES = [
    *(("llama", kind) for kind in ROUTERS),
    *(("gpt2", kind) for kind in ("token", "token-drop", "head")),
    *(("phi3", kind) for kind in ("token", "token-drop", "head")),
    *(("gemma2", kind) for kind in ("token", "neuron")),
    *(("olmo2", kind) for kind in ("token-substitute-lora", "layer")),
    ("granitemoeshared", "token"),
]


def prompts(rows: int) -> Tensor:
    return torch.randint(3, 120, (rows, 12), generator=torch.Generator().manual_seed(7))


def generated(student: LanguageStudent, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens and logits that the model makes by itself, and check that recorded steps make the same."""
    logits: list[list[Tensor]] = [[], []]

    def kept(into: list[Tensor]) -> list[Any]:
        return [lambda ids, scores: (into.append(scores.clone()), scores)[1]]

    options = {**inputs, **SIX, **options}
    plain = student.model.generate(**options, logits_processor=kept(logits[0]))
    recorded = student.generate(**options, logits_processor=kept(logits[1]))
    assert torch.equal(plain, recorded)
    torch.testing.assert_close(torch.stack(logits[1]), torch.stack(logits[0]), **CLOSE)
    return plain, torch.stack(logits[1])


@pytest.mark.parametrize(
    ("name", "kind", "ahead"), [*((*case, True) for case in CASES), *(("llama", kind, False) for kind in BEHIND)]
)
def test_recorded_tokens_and_logits(name: str, kind: str, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "runs_ahead", lambda device: ahead)
    student, made = student_for(name, ROUTERS[kind]), Tape.made
    student._decoding.recorder = Tape
    seen = []
    with warnings.catch_warnings(action="error"):
        for offset in (-0.5, 1.5):
            student.runtime.offset = offset
            seen.append(generated(student, {"input_ids": prompts(1)})[1])
        assert Tape.made == made + 1 + (kind in ANEW) and not torch.equal(*seen)
        padding = torch.ones(2, 12, dtype=torch.long)
        padding[0, :4] = 0
        rows = slice(0, 1 if "drop" in kind else 2)
        generated(student, {"input_ids": prompts(2)[rows], "attention_mask": padding[rows]})


@pytest.mark.parametrize(
    ("kind", "ahead"), [("token-substitute-lora", True), ("token-substitute-lora", False), ("head", True)]
)
def test_corrections_that_are_added_to_weights(kind: str, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "runs_ahead", lambda device: ahead)
    student = student_for("llama", ROUTERS[kind])
    student._decoding.recorder = Tape
    _, apart = generated(student, {"input_ids": prompts(1)})
    add_corrections(student)
    torch.testing.assert_close(generated(student, {"input_ids": prompts(1)})[1], apart, **CLOSE)


@pytest.mark.parametrize("kind", ["token-drop", "layer-drop", "layer"])
def test_the_cache_that_is_returned_goes_on(kind: str) -> None:
    student, prompt = student_for("llama", ROUTERS[kind]), prompts(1)
    student._decoding.recorder = Tape
    outs = [run(prompt, **SIX_LOGITS) for run in (student.model.generate, student.generate)]
    caches = [cache_of(out) for out in outs]
    assert type(caches[0]) is type(caches[1])
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert one.get_seq_length() == other.get_seq_length() == 17
        torch.testing.assert_close((other.keys, other.values), (one.keys, one.values), **CLOSE)
        if isinstance(one, DroppedLayer):
            assert one.lengths == other.lengths and torch.equal(one.index, other.index)
    more = [student.model(prompt[:, :1], **with_cache(student.model, {}, cache)).logits for cache in caches]
    torch.testing.assert_close(more[1], more[0], **CLOSE)


@pytest.mark.parametrize("slots", [16, 13])
def test_a_full_cache_is_followed_by_a_larger_one(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "slots_for", lambda tokens: max(slots, tokens))
    monkeypatch.setattr(decoding, "AT_ONCE", 1)
    student = student_for("llama", ROUTERS["token-drop"])
    student._decoding.recorder = Tape
    generated(student, {"input_ids": prompts(1)})
    assert len(student._decoding._steps) > 1


def test_layers_without_any_key_after_the_prompt() -> None:
    student = student_for("llama", ROUTERS["layer-drop"])
    student._decoding.recorder = Tape
    student.runtime.offset = -99.0
    read = student.model.generate(prompts(1), **SIX_LOGITS)
    assert any(not layer.is_initialized for layer in cache_of(read).layers)
    generated(student, {"input_ids": prompts(1)})


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [("llama", "token-drop", "rows differ in which tokens have keys"), ("mistral", "layer-drop", "a sliding window")],
)
def test_what_is_not_recorded_says_so_once(name: str, kind: str, reason: str) -> None:
    student, rows = student_for(name, ROUTERS[kind]), 1 if name == "mistral" else 2
    student._decoding.recorder, made = Tape, Tape.made
    with pytest.warns(UserWarning, match=f"^decoding without recorded steps: .*{reason}"):
        generated(student, {"input_ids": prompts(rows)})
    with warnings.catch_warnings(action="error"):
        generated(student, {"input_ids": prompts(rows)})
    assert Tape.made == made


@pytest.mark.thorough
@pytest.mark.parametrize("kind", COMPILED)
def test_a_step_compiles_whole(kind: str) -> None:
    student, results = student_for("llama", ROUTERS[kind]), []
    student._decoding.recorder = Tape  # gates are masks, as on GPUs
    cache = cache_of(student.model(prompts(1), use_cache=True))
    step = DecodeStep(student.model, student.trunk, cache, 32)
    student._settle(1, torch.device("cpu"))
    for work in (step.run, step.run, torch.compile(step.run, fullgraph=True, backend="eager")):
        step.load(cache, 12, None, torch.full((1,), 12))
        step.advance(prompts(1)[:, 0])
        results.append(work().clone())
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize("kv", ["keep", "drop"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_behind_prompts_with_images(name: str, kv: str) -> None:
    student = student_of(name, RouterSpec("token", kv=kv), RouterSpec("image", selection="quota"))
    student._decoding.recorder = Tape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that prompts are not recorded
        generated(student, make_prompts(student.model, (1,), left=True))
    assert len(student._decoding._steps) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["token", "token-drop", "layer-drop", "elastiformer", "neuron", "token-channel"])
def test_cuda_graphs_decode_what_the_model_does(kind: str) -> None:
    student = student_for("llama", ROUTERS[kind]).to("cuda")
    for offset in (-0.5, 1.5):
        student.runtime.offset = offset
        with warnings.catch_warnings(action="error"):
            generated(student, {"input_ids": prompts(1).cuda()})
            if "drop" not in kind:
                generated(student, {"input_ids": prompts(2).cuda()})
    assert all(replay is not None for _, replay in student._decoding._steps.values())
