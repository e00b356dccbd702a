"""Lossless decoding gives the dense model's text, whatever the student drafts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer

from students import LoraSpec, RouterSpec, StudentSpec
from students.families.language import LanguageStudent
from students.kernels import replay as replaying
from students.kernels.replay import Replay
from students.libraries import cache_of
from students.recording import decoding, lossless
from students.recording.lossless import verified
from tests.backends import running_on
from tests.students.tape import Tape
from tests.students.test_execution import make

SPEC = StudentSpec((RouterSpec("channel"), RouterSpec("vocab", rank=5)), LoraSpec(2))
LONG = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)


@pytest.fixture(autouse=True, scope="module")
def _in_c(library: object) -> Iterator[None]:
    with running_on("c", library), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(replaying, "RECORDED", 3)
        patch.setattr(lossless, "SURE", 0.0)  # random models are sure of nothing
        yield


def student_for(
    name: str = "llama", recorder: Any = Tape, offset: float = 0.5, spec: StudentSpec = SPEC
) -> LanguageStudent:
    student = make(name, spec, **({"vocab_size": 120} if name != "gpt2" else {}))
    assert isinstance(student, LanguageStudent)
    student.lossless.recorder, student.runtime.offset = recorder, offset
    return student


def dense(student: LanguageStudent, *args: Any, **options: Any) -> Any:
    with student.teacher():
        return student.model.generate(*args, **options)


@pytest.mark.parametrize(
    ("name", "recorder"),
    [
        *((name, Tape) for name in ("llama", "gemma2", "gpt2", "qwen3_moe", "cohere2")),
        ("llama", None),
        ("gemma3", None),
    ],
)
def test_greedy_text_and_logits_are_the_dense_models(name: str, recorder: Any, tokens: Tensor) -> None:
    student = student_for(name, recorder)
    asked = dict(LONG, return_dict_in_generate=True, output_logits=True, output_scores=True)
    expected = dense(student, tokens[:1], **asked)
    found = student.generate(tokens[:1], lossless=True, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    for kind in ("logits", "scores"):
        torch.testing.assert_close(found[kind], expected[kind], atol=2e-3, rtol=2e-3)
    for mine, theirs in zip(cache_of(found).layers, cache_of(expected).layers, strict=True):
        length = theirs.keys.shape[2]  # layers with a window hold the newest
        torch.testing.assert_close(mine.keys[:, :, -length:], theirs.keys, atol=2e-3, rtol=2e-3)
    counts = student.lossless.counts
    assert counts.tokens == 23 and 5 <= counts.rounds <= 23 and counts.rounds < counts.drafts
    if recorder is None:
        replays = [*student.lossless._steps.values(), *student.lossless._passes.values()]
        assert len(replays) == 2 and all(isinstance(replay, Replay) and replay.recorded for _, replay in replays)


@pytest.mark.parametrize("offset", [-1.0, 0.5, 50.0])
def test_more_drafts_stand_the_more_gates_are_open(offset: float, tokens: Tensor) -> None:
    student = student_for(offset=offset, spec=StudentSpec(SPEC.routers))
    assert torch.equal(student.generate(tokens[:1], lossless=True, **LONG), dense(student, tokens[:1], **LONG))
    rounds = student.lossless.counts.rounds
    assert rounds == 5 if offset == 50.0 else rounds > 5  # with all gates open, four drafts and one more a round


def test_padding_growth_and_a_copied_student(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SMALLEST", 16)
    monkeypatch.setattr(decoding, "AT_ONCE", 16)
    student = student_for()
    ids, mask = tokens[:1].clone(), torch.ones_like(tokens[:1])
    ids[0, :4], mask[0, :4] = 0, 0
    for one in (student, copy.deepcopy(student)):
        found = one.generate(ids, attention_mask=mask, lossless=True, **LONG)
        assert torch.equal(found, dense(student, ids, attention_mask=mask, **LONG))


class _Words(TextStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def put(self, value: Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.seen.append(-1)


class _Until(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("new", [1, 2, 7])
def test_stopping_processors_and_streaming(new: int, tokens: Tensor) -> None:
    student, one = student_for(offset=50.0), tokens[:1]
    asked = dict(LONG, repetition_penalty=1.3, no_repeat_ngram_size=3, min_new_tokens=0)
    whole = dense(student, one, **asked)
    streamer = _Words()
    found = student.generate(one, lossless=True, streamer=streamer, stopping_criteria=[_Until(12 + new)], **asked)
    assert torch.equal(found, whole[:, : 12 + new]) and streamer.seen == [*found[0].tolist(), -1]
    asked["eos_token_id"] = int(whole[0, 11 + new])
    assert torch.equal(student.generate(one, lossless=True, **asked), dense(student, one, **asked))
    short = dict(asked, max_new_tokens=new)
    assert torch.equal(student.generate(one, lossless=True, **short), dense(student, one, **short))


def test_a_draft_is_kept_or_replaced_to_the_dense_distribution() -> None:
    """Chi-squared of 20,000 tokens over 6 values: 5 degrees of freedom exceed 20.5 with probability 0.001."""
    torch.manual_seed(0)
    scores, guess = torch.randn(1, 6), torch.randn(1, 6) * 2
    drafts = torch.multinomial(guess.softmax(-1)[0], 20_000, replacement=True)
    seen, stood = torch.zeros(6), 0
    for draft in drafts.split(1):
        stands, token = verified(draft, guess, scores, True)
        seen[token], stood = seen[token] + 1, stood + stands
    p, q = scores.softmax(-1)[0], guess.softmax(-1)[0]
    assert float(((seen - 20_000 * p) ** 2 / (20_000 * p)).sum()) < 20.5
    assert abs(stood / 20_000 - float(torch.minimum(p, q).sum())) < 0.012


@pytest.mark.thorough
def test_sampled_text_has_the_dense_distribution(tokens: Tensor) -> None:
    """The second of four sampled tokens, a draft or its replacement, given the first: 200 tries, two tokens each."""
    student, one = student_for(recorder=None, offset=-1.0), tokens[:1]
    torch.manual_seed(0)
    sampled = dict(do_sample=True, top_k=2, temperature=0.5, max_new_tokens=4, pad_token_id=0)
    made = torch.cat([student.generate(one, lossless=True, **sampled) for _ in range(200)])[:, 12:]
    firsts, counts = made[:, 0].unique(return_counts=True)
    first = firsts[counts.argmax()]
    with student.teacher():
        logits = student.model(torch.cat([one, first.view(1, 1)], 1)).logits[0, -1] / 0.5
    best = logits.topk(2)
    share, tries = float(best.values.softmax(-1)[0]), int(counts.max())
    seconds = made[made[:, 0] == first, 1]
    assert set(seconds.tolist()) <= set(best.indices.tolist())
    error = (share * (1 - share) / tries) ** 0.5
    assert 0.02 < share < 0.98 and abs(float((seconds == best.indices[0]).float().mean()) - share) < 3.3 * error
    assert torch.equal(
        student.generate(one, lossless=True, **dict(LONG, do_sample=True, top_k=1)), dense(student, one, **LONG)
    )


def test_what_cannot_be_drafted_is_refused(tokens: Tensor) -> None:
    student = student_for()
    for options, words in (({}, "one sequence at a time, not 2"), ({"num_beams": 2}, "beam search")):
        with pytest.raises(ValueError, match=words):
            student.generate(tokens, lossless=True, **{**LONG, **options})
    with pytest.raises(ValueError, match="transformers' own loop"):
        student.generate(tokens[:1], lossless=True, assistant_model=student.model, **LONG)
    skipping = make("llama", StudentSpec((RouterSpec("token"),)))
    with pytest.raises(ValueError, match="token routers leave in depends on the text"):
        skipping.generate(tokens[:1], lossless=True, **LONG)
    student.runtime.bypass = True
    assert torch.equal(student.generate(tokens[:1], lossless=True, **LONG), student.model.generate(tokens[:1], **LONG))


def test_text_is_the_dense_models_where_recording_fails() -> None:
    def refuse(work: Any) -> Any:
        work()
        raise RuntimeError("out of memory")

    student, prompt = student_for(recorder=refuse), torch.arange(3, 15)[None]
    with pytest.warns(UserWarning, match=r"^lossless decoding without recorded passes: recording failed"):
        found = student.generate(prompt, lossless=True, **LONG)
    assert torch.equal(found, dense(student, prompt, **LONG)) and student.lossless.counts.drafts


def test_under_autocast_nothing_skips_and_nothing_is_recorded() -> None:
    student, prompt, about = student_for(), torch.arange(3, 15)[None], "under torch[.]autocast"
    student._decoding.recorder, before = Tape, Tape.made
    with torch.autocast("cpu", torch.bfloat16):
        with student.teacher(), pytest.warns(UserWarning, match=f"^decoding without recorded steps: {about}"):
            student.generate(prompt, **LONG)
        for call in (student, student.generate):
            with pytest.raises(ValueError, match=r"^torch\.autocast is on"):
                call(prompt)
        with pytest.raises(ValueError, match=about):
            student.generate(prompt, lossless=True, **LONG)
    assert Tape.made == before
    assert torch.equal(student.generate(prompt, **LONG), student.model.generate(prompt, **LONG))
    assert Tape.made == before + 1
