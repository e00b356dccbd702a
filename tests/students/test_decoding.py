"""Recorded decode steps give the tokens that the model decodes without them: the step, the dial, the cache, and options
of `generate`."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedTokenizerFast, TextStreamer

from students import LoraSpec, RouterSpec, StudentSpec
from students.families.language import LanguageStudent
from students.kernels import devices
from students.kernels.capture import KEPT, CudaGraph, recorder_for
from students.libraries import cache_of, with_cache
from students.recording import decoding
from students.recording.decoding import Decoding, slots_for
from students.recording.step import DecodeStep
from tests.pico.language import TINY, make_tiny, make_tokenizer
from tests.students.host_waits import NoHostWaits
from tests.students.tape import Tape
from tests.students.test_execution import COUNTED, make

pytestmark = pytest.mark.usefixtures("no_gradients")

DEFAULT = StudentSpec((RouterSpec("channel"), RouterSpec("vocab", rank=5)))
CORRECTED = StudentSpec((RouterSpec("channel"), RouterSpec("vocab", rank=5)), LoraSpec(2))
STATIC = StudentSpec((RouterSpec("channel", network="static"), RouterSpec("head", network="static")))
CLOSE = dict(atol=2e-3, rtol=2e-3)
GREEDY = dict(do_sample=False, pad_token_id=0)
SIX = dict(GREEDY, max_new_tokens=6, min_new_tokens=6)
SIX_LOGITS = dict(SIX, return_dict_in_generate=True, output_logits=True)


@pytest.fixture
def padded(tokens: Tensor, padding: Tensor) -> dict[str, Tensor]:
    """Inputs of a batch [2, 12] whose first row is padded at the left by 4."""
    return {"input_ids": tokens * padding, "attention_mask": padding}


def student_for(name: str = "llama", spec: StudentSpec = DEFAULT) -> LanguageStudent:
    student = make(name, spec, **({"vocab_size": 120} if name != "gpt2" else {}))
    assert isinstance(student, LanguageStudent)
    student._decoding._texts = None  # recorded prompts have tests of their own
    return student


def both(student: LanguageStudent, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Return what `generate` returns without and with recorded steps, the latter without warnings."""
    plain = student.model.generate(*args, **options)
    student._decoding.recorder = Tape
    before = Tape.made
    with warnings.catch_warnings(action="error"):
        recorded = student.generate(*args, **options)
    student._decoding.made = Tape.made - before
    return plain, recorded


@pytest.mark.parametrize(
    ("operators", "name", "spec"),
    [
        *(("c", name, DEFAULT) for name in sorted(TINY)),
        *(("c", name, spec) for name in COUNTED for spec in (CORRECTED, STATIC)),
        *(("reference", "llama", spec) for spec in (DEFAULT, CORRECTED, STATIC)),
    ],
    indirect=["operators"],
)
def test_recorded_tokens_and_logits(name: str, spec: StudentSpec, padded: dict[str, Tensor], operators: None) -> None:
    student = student_for(name, spec)
    for inputs in (padded, {"input_ids": padded["input_ids"][1:]}):
        plain, recorded = both(student, **inputs, **SIX_LOGITS, output_scores=True)
        assert student._decoding.made == 1
        assert torch.equal(recorded.sequences, plain.sequences)
        for kind in ("logits", "scores"):
            torch.testing.assert_close(recorded[kind], plain[kind], **CLOSE)


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_dense_model(name: str, padded: dict[str, Tensor]) -> None:
    model = make_tiny(name)
    recorded = Decoding(model, model.base_model, recorder=Tape).generate(**padded, **SIX)
    assert torch.equal(recorded, model.generate(**padded, **SIX))


@pytest.mark.parametrize(("name", "rows"), [*((name, 1) for name in sorted(TINY)), ("llama", 2), ("llama", 8)])
def test_nothing_in_a_step_waits_for_the_device(name: str, rows: int, tokens: Tensor) -> None:
    student = student_for(name)
    prompt = tokens[:1].repeat(rows, 1)
    for way in ("routed", "teacher"):
        student.runtime.bypass = way == "teacher"
        out = student.model(prompt, use_cache=True)
        step = DecodeStep(student.model, student.trunk, cache_of(out), 32)
        step.load(cache_of(out), 12, None, torch.full((rows,), 12))
        student._settle(rows, prompt.device)
        step.advance(tokens[0, :1].repeat(rows))
        step.run()  # makes what is made once
        with NoHostWaits():
            step.run()


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "rows"), [("llama", 1), ("gemma2", 2)])
def test_a_step_compiles_whole(name: str, rows: int, tokens: Tensor) -> None:
    student = student_for(name)
    cache, results = cache_of(student.model(tokens[:rows], use_cache=True)), []
    step = DecodeStep(student.model, student.trunk, cache, 32)
    student._settle(rows, tokens.device)
    for work in (step.run, step.run, torch.compile(step.run, fullgraph=True, backend="eager")):
        step.load(cache, 12, None, torch.full((rows,), 12))
        step.advance(tokens[:rows, 0])
        results.append(work().clone())
    assert torch.equal(results[1], results[2])


def turned(student: LanguageStudent, offset: Any) -> None:
    student.runtime.offset, student.runtime.bypass = offset, offset == float("inf")


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_turning_the_dial_records_nothing_anew(rows: int, tokens: Tensor, operators: None) -> None:
    student = student_for()
    prompt = torch.cat([tokens, tokens.flip(1), tokens + 1 - tokens % 2, tokens.roll(3, 1)])[:rows]
    seen = []
    for number, offset in enumerate((0.0, 1.5, -1.0, 0.7)):
        turned(student, offset)
        plain, recorded = both(student, prompt, **SIX_LOGITS)
        assert student._decoding.made == (number == 0)
        assert torch.equal(recorded.sequences, plain.sequences)
        torch.testing.assert_close(torch.stack(recorded.logits), torch.stack(plain.logits), **CLOSE)
        seen.append(torch.stack(recorded.logits))
    assert not torch.equal(seen[0], seen[1])


def test_every_row_has_its_budget(tokens: Tensor) -> None:
    student = student_for()
    for number, offsets in enumerate(((0.0, 1.0), (-1.0, float("inf")))):
        turned(student, offsets)
        plain, recorded = both(student, tokens, **SIX)
        assert torch.equal(recorded, plain) and student._decoding.made == (number == 0)
    turned(student, 0.5)
    assert torch.equal(*both(student, tokens, **SIX)) and student._decoding.made == 1
    for number, prompt in enumerate((tokens, tokens.repeat(2, 1), tokens)):
        turned(student, (1.0, -float(number)))
        assert torch.equal(*both(student, prompt, **SIX)) and student._decoding.made == (number == 1)


def test_the_teacher_and_static_choices_have_steps_of_their_own(tokens: Tensor) -> None:
    student, made = student_for(spec=STATIC), []
    for offset in (float("inf"), 0.0, 1.0, float("inf"), 0.0, float("inf")):
        turned(student, offset)
        assert torch.equal(*both(student, tokens, **SIX))
        made.append(student._decoding.made)
    assert made == [1, 1, 1, 1, 1, 0], "each choice slices weights anew, and skipping moves those of the teacher"


@pytest.mark.parametrize(
    "router",
    [
        RouterSpec("token", network="static"),
        RouterSpec("token", network="static", substitute=2),
        RouterSpec("layer", network="static"),
        RouterSpec("token", network="static", kv="drop", sites=("mlp",)),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_branches_that_are_closed_for_all_tokens(
    name: str, router: RouterSpec, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)
    student = student_for(name, StudentSpec((RouterSpec("channel"), router)))
    scores = [p for n, p in student.added_parameters().items() if n.endswith(f"{router.kind}.score")]
    assert scores
    for number, score in enumerate(scores):
        score.fill_(0.5 if number % 3 else -0.5)
    for prompt in (tokens, tokens[:1]):
        for offset in (0.0, 1.0):
            turned(student, offset)
            assert torch.equal(*both(student, prompt, **SIX)) and student._decoding.made == 1
    turned(student, (0.0, 1.0))
    with pytest.warns(UserWarning, match="differs between rows"):
        student.generate(tokens, **SIX)


def test_routers_that_have_learned_are_recorded_anew(tokens: Tensor) -> None:
    student = student_for(spec=CORRECTED)
    both(student, tokens, **SIX)
    for parameter in student.added_parameters().values():
        parameter.mul_(0.5)
    assert torch.equal(*both(student, tokens, **SIX)) and student._decoding.made == 1


def test_slots_grow_by_a_half_at_most() -> None:
    sizes = [slots_for(tokens) for tokens in (1, 256, 257, 385, 513, 769, 1025)]
    assert sizes == [256, 256, 384, 512, 768, 1024, 1536]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_full_cache_is_followed_by_a_larger_one(
    name: str, padded: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "SMALLEST", 16)
    student = student_for(name)
    options = dict(SIX, max_new_tokens=20, min_new_tokens=20)
    plain, recorded = both(student, **padded, **options)
    assert torch.equal(recorded, plain)
    assert [key[1] for key in student._decoding._steps] == [32] and student._decoding.made == 1
    monkeypatch.setattr(decoding, "AT_ONCE", 16)
    assert torch.equal(both(student, **padded, **options)[1], plain)
    assert [key[1] for key in student._decoding._steps] == [16, 24, 32] and student._decoding.made == 2
    assert torch.equal(both(student, **padded, **options)[1], plain) and student._decoding.made == 0


def test_few_recorded_steps_are_kept(tokens: Tensor) -> None:
    student = student_for()
    for rows in range(1, 8):
        assert torch.equal(*both(student, tokens[:1].repeat(rows, 1), **SIX))
    assert len(student._decoding._steps) == KEPT
    both(student, tokens[:1].repeat(7, 1), **SIX)
    assert student._decoding.made == 0


def test_the_cache_that_is_returned_goes_on(padded: dict[str, Tensor]) -> None:
    student = student_for()
    whole = student.model.generate(**padded, **SIX)
    student._decoding.recorder = Tape
    half = dict(SIX, max_new_tokens=3, min_new_tokens=3)
    first = student.generate(**padded, **half, return_dict_in_generate=True)
    cache = cache_of(first)
    assert type(cache) is DynamicCache and cache.get_seq_length() == 14
    student.generate(**padded, **SIX)  # writes to the recorded steps' cache
    mask = torch.cat([padded["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    options = with_cache(student.model, half, cache)
    assert torch.equal(student.generate(first.sequences, attention_mask=mask, **options), whole)


def test_in_inference_mode_and_out_of_it(tokens: Tensor) -> None:
    student = student_for()
    expected = student.model.generate(tokens, **SIX)
    student._decoding.recorder = Tape
    for offset in (0.0, 1.0, 0.0):
        turned(student, offset)
        with torch.inference_mode():
            student.model(tokens)
    with torch.inference_mode():
        student.model(tokens[:1, :1])
    assert torch.equal(student.generate(tokens, **SIX), expected)
    turned(student, 2.0)
    other = student.generate(tokens, **SIX)
    turned(student, 0.0)
    assert torch.equal(student.generate(tokens, **SIX), expected)
    turned(student, 2.0)
    assert torch.equal(other, student.model.generate(tokens, **SIX))


def test_copies_record_for_themselves(tokens: Tensor) -> None:
    student = student_for()
    both(student, tokens, **SIX)
    other = copy.deepcopy(student)
    assert other._decoding.model is other.model and not other._decoding._steps
    assert torch.equal(*both(other, tokens, **SIX)) and other._decoding.made == 1


def test_sampling(padded: dict[str, Tensor]) -> None:
    student = student_for()
    options = dict(SIX, do_sample=True, top_k=20, temperature=1.3, num_return_sequences=2)
    student._decoding.recorder = Tape
    made = []
    for work in (student.model.generate, student.generate):
        torch.manual_seed(3)
        made.append(work(**padded, **options))
    assert torch.equal(*made) and made[0].shape == (4, 18)


def test_rows_end_where_they_end(tokens: Tensor) -> None:
    student = student_for()
    free = student.model.generate(tokens, max_new_tokens=12, **GREEDY)
    end, other = int(free[0, 15]), int(free[1, 20])
    for options in (*(dict(max_new_tokens=12, eos_token_id=ids) for ids in (end, [end, other])), dict(max_length=20)):
        assert torch.equal(*both(student, tokens, **GREEDY, **options))


def test_criteria_processors_and_configurations(tokens: Tensor) -> None:
    student, calls = student_for(), []

    def forbid(ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(ids.shape[1])
        scores[:, ids[:, -1]] = -torch.inf
        return scores

    def long_enough(ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 15)

    options = dict(SIX, logits_processor=LogitsProcessorList([forbid]), stopping_criteria=[long_enough])
    plain, recorded = both(student, tokens, **options)
    assert torch.equal(plain, recorded) and recorded.shape == (2, 15) and calls == [12, 13, 14] * 2
    config = GenerationConfig(max_new_tokens=4, repetition_penalty=1.5, no_repeat_ngram_size=2, pad_token_id=0)
    assert torch.equal(*both(student, tokens, generation_config=config))


def test_text_that_ends_it(tokens: Tensor) -> None:
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:120])}
    model = Tokenizer(models.BPE(letters, []))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    student, tokenizer = student_for(), PreTrainedTokenizerFast(tokenizer_object=model)
    eight = dict(GREEDY, max_new_tokens=8)
    free = student.model.generate(tokens[:1], **eight)
    word = tokenizer.decode(free[0, 14:16])
    plain, recorded = both(student, tokens[:1], **eight, stop_strings=[word], tokenizer=tokenizer)
    assert torch.equal(plain, recorded) and recorded.shape[1] < free.shape[1] and student._decoding.made == 1


def test_words_are_streamed(tokens: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    student, tokenizer = student_for(), make_tokenizer(words=117)
    said = []
    for model in (student.model, student):
        student._decoding.recorder = Tape
        model.generate(tokens[:1], **SIX, streamer=TextStreamer(tokenizer, skip_prompt=True))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0].split()) == 6


@pytest.mark.parametrize(
    ("router", "options", "reason"),
    [
        (RouterSpec("layer", granularity="sequence"), {}, "what layer routers leave in depends on the text"),
        (RouterSpec("head", granularity="sequence"), {}, "what head routers leave in depends on the text"),
        (RouterSpec("channel"), {"num_beams": 2}, "beam search moves rows of the cache"),
        (RouterSpec("channel"), {"output_hidden_states": True}, "hidden states are not kept"),
    ],
)
def test_where_nothing_can_be_recorded_it_says_so_once(
    router: RouterSpec, options: dict[str, Any], reason: str, tokens: Tensor
) -> None:
    student = student_for(spec=StudentSpec((router,)))
    student._decoding.recorder, before = Tape, Tape.made
    with pytest.warns(UserWarning, match=f"^decoding without recorded steps: .*{reason}"):
        first = student.generate(tokens, **SIX, **options)
    with warnings.catch_warnings(action="error"):
        assert torch.equal(student.generate(tokens, **SIX, **options), first)
    assert Tape.made == before
    turned(student, float("inf"))
    if not options:  # the teacher can be recorded
        assert torch.equal(*both(student, tokens, **SIX)) and student._decoding.made == 1


def test_a_model_that_cannot_be_recorded_takes_the_same_steps(tokens: Tensor) -> None:
    def refuse(work: Any) -> Any:
        work()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    student = student_for()
    expected = student.model.generate(tokens, **SIX)
    student._decoding.recorder = refuse
    with pytest.warns(UserWarning, match=r"recording failed \(operation not .* capturing\)$"):
        assert torch.equal(student.generate(tokens, **SIX), expected)
    with warnings.catch_warnings(action="error"):
        assert torch.equal(student.generate(tokens, **SIX), expected)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_who_decides_for_himself_is_left_alone(options: dict[str, Any], tokens: Tensor) -> None:
    student = student_for()
    plain, recorded = both(student, tokens, **SIX, **options)
    assert torch.equal(plain, recorded) and student._decoding.made == 0


@pytest.mark.parametrize("operators", ["reference"], indirect=True)
def test_cpus_decode_as_ever(tokens: Tensor, operators: None) -> None:
    record = recorder_for(torch.device("cuda", 1))
    assert recorder_for(torch.device("cpu")) is None and isinstance(record, partial) and record.func is CudaGraph
    student = student_for()
    student.generate(tokens, **SIX)
    assert not student._decoding._steps


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_cuda_graphs_decode_what_the_model_does(name: str, padded: dict[str, Tensor]) -> None:
    student = student_for(name).to("cuda")
    inputs = {key: tensor.to("cuda") for key, tensor in padded.items()}
    for offset in (0.0, 1.0, float("inf")):
        turned(student, offset)
        plain, recorded = (work(**inputs, **SIX_LOGITS) for work in (student.model.generate, student.generate))
        assert student._decoding._steps and torch.equal(recorded.sequences, plain.sequences)
        torch.testing.assert_close(torch.stack(recorded.logits), torch.stack(plain.logits), **CLOSE)


@pytest.mark.gpu
def test_after_a_recording_that_fails_all_is_as_before() -> None:
    x = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError):
        CudaGraph(lambda: x * x.item())
    assert torch.cuda.current_stream() == torch.cuda.default_stream() and 0 <= float(torch.rand(1, device="cuda")) <= 1
    assert float(CudaGraph(lambda: x + 1)()) == 2
