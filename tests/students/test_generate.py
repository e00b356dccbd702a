"""transformers' own `generate` takes students as models: searches, batches, caches, streams and pipelines work."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache, TextStreamer, pipeline

from students import RouterSpec, Student, StudentSpec
from students.execution.kv_cache import RoutedCache, cache_bytes
from students.libraries import cache_of, with_cache
from tests.pico.language import make_tiny, make_tokenizer
from tests.students.test_execution import CLOSE, SPECS, make

PICKED = ["channel", "token-drop", "token-sequence", "head-sequence", "expert-sequence", "mixed", "mixed-keep", "vocab"]


@pytest.fixture(params=PICKED)
def student(request: pytest.FixtureRequest) -> Student:
    return make("llama", SPECS[request.param])


def generate(student: Student, ids: Tensor, **options: object) -> Tensor:
    """Generate six tokens greedily, without stopping at an end token, unless options say otherwise."""
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0) | options
    return student.generate(ids, **options)


def without_cache(student: Student, ids: Tensor) -> Tensor:
    """Generate six tokens greedily, with one forward pass over the whole text for each."""
    prompt = ids.shape[1]
    for _ in range(6):
        marked = (torch.arange(ids.shape[1]) < prompt).expand(ids.shape)
        with torch.no_grad():
            logits = student(ids, prompt=marked)[0].logits[:, -1]
        logits[:, 2] = -torch.inf  # as generate forbids the end token below min_new_tokens
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


def test_what_are_no_token_ids_is_refused_before_anything_runs():
    student = make("llama", SPECS["channel"])
    for ids, said in (
        (torch.tensor([[3, 120]]), "holds 120: the model's tokens are numbered from 0 to 119"),
        (torch.tensor([[3, -1]]), "holds -1: the model's tokens"),
        (torch.ones(1, 4), r"is torch\.float32 \[1, 4\]: give token ids, torch\.long"),
        (torch.ones(4, dtype=torch.long), r"is torch\.int64 \[4\]: give"),
        (torch.ones(1, 0, dtype=torch.long), r"is torch\.int64 \[1, 0\]: give"),
        ([3, 4], "is list: give"),
    ):
        for call in (student, student.features, student.generate):
            with pytest.raises(ValueError, match="input_ids " + said):
                call(ids)


def test_what_does_not_go_with_token_ids_is_refused_before_anything_runs(tokens: Tensor):
    student = make("llama", SPECS["channel"])
    for name, value, said in (
        ("attention_mask", tokens[:1], r"attention_mask is \[1, 12\]: it goes with input_ids \[2, 12\]"),
        ("attention_mask", tokens[:, None], r"attention_mask is \[2, 1, 12\]"),
        ("position_ids", torch.arange(4)[None], r"position_ids is \[1, 4\]"),  # the kernel read what was behind them
        ("past_key_values", ((tokens,),), "the cache is a tuple: give one of transformers"),
    ):
        for call in (student, student.features, student.generate):
            with pytest.raises(ValueError, match=said):
                call(tokens, **{name: value})


def test_calls_of_several_threads_take_turns(tokens: Tensor):
    student = make("llama", SPECS["channel"])
    prompts = [tokens[:1, :count] for count in (3, 5, 8, 12)] * 3
    alone = [generate(student, prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(partial(generate, student), prompts))
    assert all(map(torch.equal, together, alone))
    assert torch.equal(generate(copy.deepcopy(student), prompts[0]), alone[0])


def test_greedy(student: Student, tokens: Tensor):
    for row in (tokens[:1], tokens):
        assert torch.equal(generate(student, row), without_cache(student, row))


def test_left_padded_batch_is_one_by_one(student: Student, tokens: Tensor):
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    padded[0, 4:], padded[0, :4], mask[0, :4] = tokens[0, :8], 0, 0
    batch = generate(student, padded, attention_mask=mask)
    assert torch.equal(batch[0, 4:], generate(student, tokens[:1, :8])[0])
    assert torch.equal(batch[1:], generate(student, tokens[1:]))


def test_beam_search(student: Student, tokens: Tensor):
    cached = generate(student, tokens, num_beams=3)
    if any(router.granularity == "sequence" for router in student.spec.routers):
        # without a cache, each step would take generated tokens for a part of the prompt
        assert cached.shape == (2, 18)
    else:
        assert torch.equal(cached, generate(student, tokens, num_beams=3, use_cache=False))


def test_sampling_is_repeatable(student: Student, tokens: Tensor):
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(generate(student, tokens, do_sample=True, num_return_sequences=2))
    assert texts[0].shape == (4, 18) and torch.equal(*texts)


def test_a_prompt_that_is_decided_from_is_read_at_once(tokens: Tensor):
    student = make("llama", SPECS["token-sequence"])
    for name, value in (("assistant_model", make_tiny("llama")), ("prefill_chunk_size", 4)):
        with pytest.raises(ValueError, match=f"generate without {name}"):
            generate(student, tokens[:1], **{name: value})


def test_guesses_are_taken_back_behind_a_sliding_window(tokens: Tensor):
    student = make("mistral", StudentSpec((RouterSpec("layer", blocks="odd", kv="drop"),)))
    length = dict(max_new_tokens=12, min_new_tokens=12)
    guessed = generate(student, tokens[:1], assistant_model=make_tiny("llama"), **length)
    assert torch.equal(guessed, generate(student, tokens[:1], **length))


def test_continued_from_a_cache(student: Student, tokens: Tensor):
    first = generate(student, tokens, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    more = generate(student, first.sequences, max_new_tokens=3, min_new_tokens=3, past_key_values=cache_of(first))
    assert torch.equal(more, generate(student, tokens))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_heads_that_share_keys_attend_together_from_one_token(
    name: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
):
    """Query heads that share a key head attend as one head when the student decodes a token by skipping.

    With masks, and as the teacher, the student attends as the model does; as the teacher, bit for bit."""
    plain, student = make_tiny(name), make(name, SPECS["channel"])
    attend, shapes = F.scaled_dot_product_attention, []

    def watch(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        shapes.append(tuple(query.shape[1:3]))
        return attend(query, *args, **kwargs)

    def decode(model: PreTrainedModel) -> Tensor:
        """Return the logits of the last token, and leave (heads, queries) of its attention calls in `shapes`."""
        cache = cache_of(model(tokens[:, :-1]))
        shapes.clear()
        return model(tokens[:, -1:], **with_cache(model, {}, cache)).logits

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    frozen = decode(plain)
    of_model = set(shapes)
    with student.teacher():
        assert torch.equal(decode(student.model), frozen)
    assert set(shapes) == of_model
    student.runtime.execution = "mask"
    masked = decode(student.model)
    assert set(shapes) == of_model
    student.runtime.execution = "skip"
    torch.testing.assert_close(decode(student.model), masked, **CLOSE)
    assert set(shapes) == ({(2, 2)} if name == "llama" else of_model)


@pytest.mark.parametrize("kind", [kind for kind in PICKED if kind not in ("token-drop", "mixed", "mixed-keep")])
def test_static_cache(kind: str, tokens: Tensor):
    student = make("llama", SPECS[kind])
    cache = StaticCache(config=student.model.config, max_cache_len=24)
    static = generate(student, tokens, past_key_values=cache, disable_compile=True)
    assert torch.equal(static, generate(student, tokens))


def test_caches_that_hold_every_key_are_refused_where_keys_are_dropped(tokens: Tensor):
    student = make("llama", SPECS["token-drop"])
    with pytest.raises(ValueError, match="StaticCache holds a key of every token"):
        generate(student, tokens, past_key_values=StaticCache(config=student.model.config, max_cache_len=24))
    with torch.no_grad(), student.teacher():
        filled = cache_of(student(tokens, use_cache=True)[0])
    assert type(filled) is DynamicCache
    with torch.no_grad(), pytest.raises(ValueError, match="empty at the start"):
        student(tokens, use_cache=True, past_key_values=filled)


def test_the_cache_holds_the_tokens_that_attend(tokens: Tensor):
    student = make("llama", StudentSpec((RouterSpec("token", sites=("attn",), kv="drop"),)))
    with torch.no_grad():
        out, decisions = student(tokens[:1], use_cache=True)
        dense = DynamicCache(config=student.model.config)
        student.model(tokens[:1], **with_cache(student.model, {"use_cache": True}, dense))
        with student.teacher():
            whole = cache_bytes(cache_of(student(tokens[:1], use_cache=True)[0]))
    cache = cache_of(out)
    assert isinstance(cache, RoutedCache) and cache.get_seq_length() == tokens.shape[1]
    kept = [int(decisions.share[f"{n}.attn.token"].sum()) for n in range(3)]
    assert [layer.lengths for layer in cache.layers] == [[n] for n in kept]
    indices = 8 * sum(kept)
    assert cache_bytes(cache) - indices == whole * sum(kept) / (3 * tokens.shape[1])


def test_cache_follows_crops_and_rows(tokens: Tensor):
    student = make("llama", SPECS["token-drop-all"])
    with torch.no_grad():
        cache = cache_of(student(tokens, use_cache=True)[0])
        cache.crop(-4)
        again = student(tokens[:, 8:], use_cache=True, past_key_values=cache)[0].logits
        torch.testing.assert_close(student(tokens)[0].logits[:, 8:], again, atol=1e-4, rtol=1e-3)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        assert [len(layer.lengths) for layer in cache.layers] == [2, 2, 2] and cache.get_seq_length() == 12


def test_streaming_and_pipeline(tokens: Tensor, capsys: pytest.CaptureFixture):
    student, tokenizer = make("llama", SPECS["mixed"]), make_tokenizer(words=117)
    text = tokenizer.decode(generate(student, tokens[:1])[0], skip_special_tokens=True)
    generate(student, tokens[:1], streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    assert capsys.readouterr().out.split() == text.split()
    pipe = pipeline("text-generation", model=student.model, tokenizer=tokenizer)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert pipe("w3 w4 w5", **options)[0]["generated_text"].startswith("w3 w4 w5")


def test_teacher_generates_what_it_did(student: Student, tokens: Tensor):
    expected = make_tiny("llama").generate(tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    generate(student, tokens)
    with student.teacher():
        assert torch.equal(generate(student, tokens), expected)


@pytest.mark.thorough
def test_compiled_steps_agree(tokens: Tensor):
    """Forward passes compiled by torch's inductor agree with eager ones, with routers that keep all shapes static.

    Without vector instructions, since to try which of them work takes the C++ compiler as long as the kernels."""
    inductor = pytest.importorskip("torch._inductor.config")
    from shutil import which

    if which("g++") is None and which("clang++") is None:
        pytest.skip("no C++ compiler")
    spec = StudentSpec((RouterSpec("channel"), RouterSpec("vocab", rank=5)))
    student = make("llama", spec, num_hidden_layers=1)
    with torch.no_grad(), inductor.patch("cpp.vec_isa_ok", False):
        for ids in (tokens, tokens[:1, :1]):
            expected = student.model(ids, use_cache=False).logits
            compiled = torch.compile(student.model)(ids, use_cache=False).logits
            torch.testing.assert_close(expected, compiled, atol=1e-4, rtol=1e-3)


def test_fixed_capacities_skip_in_training_too(tokens: Tensor):
    """In training, skipping has the loss and gradients of masks for fewer FLOPs: tokens that a weighted top-k router
    closes give no gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    spec = StudentSpec((RouterSpec("token", selection="topk", weight="score", substitute=2),))
    results = []
    for way in ("mask", "skip"):
        student = make("llama", spec, attn_implementation="eager").train()
        student.runtime.execution = way
        with FlopCounterMode(display=False) as counter:
            out, decisions = student(tokens)
            loss = out.logits.float().logsumexp(-1).mean() + decisions.share["1.mlp.token"].mean()
            loss.backward()
        results.append((loss.item(), counter.get_total_flops(), [p.grad for p in student.added_parameters().values()]))
    (masked, dense_flops, expected), (skipped, flops, gradients) = results
    assert masked == pytest.approx(skipped, rel=1e-4) and flops < 0.8 * dense_flops
    torch.testing.assert_close(expected, gradients, atol=1e-5, rtol=1e-3)
