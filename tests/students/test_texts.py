"""Recorded passes over texts: they give what the model gives, whatever the text leaves open, and never wait."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from students import LoraSpec, RouterSpec, Student, StudentSpec
from students.execution.room import room_for
from students.kernels import devices
from students.libraries import cache_of
from students.recording import text
from students.recording.text import padded_to
from tests.students.tape import Tape
from tests.students.test_execution import CLOSE, SPECS, make

ROUTERS = {
    "token": StudentSpec((RouterSpec("token"),)),
    "token-substitute": StudentSpec((RouterSpec("token", substitute=2, network="mlp"),), LoraSpec(2)),
    "token-prefix-weighted": StudentSpec((RouterSpec("token", prefix=3, weight="score", substitute=2),)),
    "token-drop": StudentSpec((RouterSpec("token", kv="drop", substitute=2),)),
    "layer-drop": StudentSpec((RouterSpec("layer", kv="drop"),)),
    "layer-drop-odd-weighted": StudentSpec((RouterSpec("layer", kv="drop", blocks="odd", weight="score"),)),
    "layer-keep": StudentSpec((RouterSpec("layer", substitute=2),)),
    "token-and-channel": SPECS["mixed-channels"],
    "token-head": StudentSpec((RouterSpec("token"), RouterSpec("head"), RouterSpec("expert", groups=6))),
    "channel": StudentSpec((RouterSpec("channel"), RouterSpec("vocab", rank=5))),
}


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Treat every device as one that the host runs ahead of."""
    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)
    with torch.no_grad():
        yield


def texts(rows: int, *lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randint(3, 120, (rows, tokens), generator=generator) for tokens in lengths]


def reading(student: Student, recorder: Any = Tape) -> tuple[Any, Any]:
    """Return a function that reads texts through recorded passes, and one that lets the model read them."""
    student._decoding.recorder = recorder

    def plainly(ids: Tensor) -> Any:
        return student.model(ids, use_cache=True, logits_to_keep=1)

    return lambda ids: student._decoding._texts.read(ids, recorder, lambda: plainly(ids)), plainly


def follow(student: Student, out: Any, new: Tensor) -> Any:
    """Return the model's logits for one more token behind what an output's cache holds, and the cache."""
    made = student(new, use_cache=True, past_key_values=cache_of(out))[0]
    held = []
    for layer in cache_of(made).layers:
        filled = ~getattr(layer, "index", torch.zeros(1, 1)).ge(0)[:, None, :, None]
        held.append([x.masked_fill(filled, 0) for x in (layer.keys, layer.values)])
    return made.logits, held


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", kind) for kind in ROUTERS]
    + [("olmo2", "token-substitute"), ("gpt2", "token-drop"), ("phi3", "layer-drop")]
    + [(name, kind) for name in ("gemma2", "mistral") for kind in ("token", "layer-drop", "channel")],
)
@pytest.mark.parametrize(("rows", "lengths"), [(1, (40, 37, 43, 41)), (1, (48, 48, 48)), (3, (34, 37, 35))])
def test_recorded_texts_are_read_as_by_the_model(name: str, kind: str, rows: int, lengths: tuple[int, ...]) -> None:
    student = make(name, ROUTERS[kind])
    read, plainly = reading(student)
    made, given = Tape.made, texts(rows, *lengths)
    outs = [read(ids) for ids in given]
    student._decoding.recorder = None
    assert Tape.made > made
    for ids, out in zip(given, outs, strict=True):  # no pass has overwritten what an earlier one returned
        own = plainly(ids)
        torch.testing.assert_close(out.logits.float(), own.logits.float(), **CLOSE)
        new = ids[:, :1]
        for mine, theirs in zip(*(follow(student, x, new) for x in (out, own)), strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE)


def test_a_text_that_needs_more_room_is_read_again() -> None:
    """Whatever a recorded pass had room for, the result is right, and there is more room the next time."""
    student = make("llama", ROUTERS["token-substitute"], max_position_embeddings=200)
    read, plainly = reading(student)
    first, second = texts(1, 192, 192)
    read(first), read(first)
    store = student._decoding._texts
    (key,) = store.kept
    made, before = Tape.made, store._met[key]
    for spare, offset in ((1, 1.0), (2, 99.0)):
        student.runtime.offset = offset  # as in a text of which routers leave more open; no part of the key here
        store.routing.state = lambda *_: key[-1]
        torch.testing.assert_close(read(second).logits, plainly(second).logits, **CLOSE)
        assert key not in store.kept and store._met[key].spare == spare and Tape.made == made
        assert any(n > m for n, m in zip(store._met[key].numbers, before.numbers, strict=True))
        torch.testing.assert_close(read(second).logits, plainly(second).logits, **CLOSE)
        made, before = made + 1, store._met[key]
        assert Tape.made == made
    assert before.numbers == [second.numel()] * len(before.numbers), "everything was open in the end"
    student.runtime.offset = -99.0  # all closed: any room is enough
    torch.testing.assert_close(read(second).logits, plainly(second).logits, **CLOSE)
    assert Tape.made == made


def test_a_row_that_needs_more_room_than_others_is_read_again() -> None:
    """Rows of which some tokens write no keys attend side by side, with room for as many tokens in each."""
    spec = StudentSpec((RouterSpec("layer", kv="drop", blocks="even"),))
    student = make("llama", spec, num_hidden_layers=2, max_position_embeddings=200)
    read, plainly = reading(student)
    (balanced,) = texts(2, 96)
    for _ in range(2):
        read(balanced)
    store = student._decoding._texts
    (key,), made = store.kept, Tape.made
    with student._deciding_from(None) as decisions:
        plainly(balanced)
    (open_,) = decisions.share.values()
    apart = balanced.flatten()[open_.flatten().argsort(stable=True)].view(2, 96)
    (_, most), (together, each) = store._met[key].numbers, store.kept[key][0].limits
    torch.testing.assert_close(read(apart).logits, plainly(apart).logits, **CLOSE)
    assert store._met[key].numbers[0] <= together and most <= each < store._met[key].numbers[1], "of one row alone"
    for _ in range(2):
        torch.testing.assert_close(read(apart).logits, plainly(apart).logits, **CLOSE)
    assert Tape.made == made + 1


def test_room_is_given_in_units() -> None:
    assert room_for([0, 1, 64, 65, 2048], 2048, 0) == [32, 32, 64, 96, 2048]
    assert room_for([0, 1, 64, 65, 2048], 2048, 2) == [64, 96, 128, 160, 2048]
    assert room_for([0, 3], 5, 0) == [5, 5]


def test_turning_the_dial_of_a_share_of_heads_records_anew() -> None:
    student = make("llama", StudentSpec((RouterSpec("head", selection="topk"),)))
    read, plainly = reading(student)
    (text,) = texts(1, 32)
    for capacity in (0.75, 0.25):
        student.runtime.capacity, made = capacity, Tape.made
        for _ in range(3):
            torch.testing.assert_close(read(text).logits, plainly(text).logits, **CLOSE)
        assert Tape.made == made + 1


def test_few_lengths_are_recorded() -> None:
    found = [padded_to(tokens) for tokens in range(1, 2049)]
    assert all(0 <= longer - tokens < max(16, tokens / 8) for tokens, longer in enumerate(found, 1))
    assert len({*found}) == 16 + 8 * 3 and found[-1] == 2048


def test_what_is_recorded_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "HELD", 90)
    monkeypatch.setattr(text, "MOST", 60)
    student = make("llama", ROUTERS["channel"])
    read, _ = reading(student)
    made, store = Tape.made, student._decoding._texts
    for one in texts(1, *[70, 16, 32, 48, 58] * 2):
        read(one)
    assert Tape.made == made, "by turns they need more than is held"
    for one in texts(1, 32, 40, 32, 35, 32, 40):
        read(one)
    assert Tape.made == made + 2 and len(store.kept) == len(store._met) == 2, "padded and full"
    student.runtime.offset = 0.1
    read(texts(1, 32)[0])
    assert Tape.made == made + 2, "of channels a recorded pass reads the dial"
    student.runtime.bypass = True
    for one in texts(1, 32, 32):
        read(one)
    assert Tape.made == made + 3 and len(store.kept) == 2


def test_what_cannot_be_recorded_is_read_by_the_model() -> None:
    def refuse(work: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    student = make("llama", ROUTERS["token"])
    read, plainly = reading(student, refuse)
    first, second, third = texts(1, 48, 48, 48)
    read(first)
    with pytest.warns(UserWarning, match="^texts without recorded passes: recording failed"):
        out = read(second)
    for ids, found in ((second, out), (third, read(third))):  # no second warning
        torch.testing.assert_close(found.logits, plainly(ids).logits, **CLOSE)
    for kind in ("layer-sequence", "token-static"):
        student = make("llama", SPECS[kind])
        read, plainly = reading(student, refuse)
        for ids in texts(1, 40, 40):
            torch.testing.assert_close(read(ids).logits, plainly(ids).logits, **CLOSE)
        assert not student._decoding._texts._met


@pytest.mark.parametrize(("kind", "rows"), [("token-substitute", 1), ("layer-drop", 1), ("layer-drop", 2)])
def test_generate_reads_its_prompt_so(kind: str, rows: int) -> None:
    student = make("llama", ROUTERS[kind])
    prompt, made = texts(rows, 20)[0], Tape.made
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, eos_token_id=119, pad_token_id=0)
    wanted = student.model.generate(prompt, **options)
    student._decoding.recorder = Tape
    steps = rows == 1
    for number in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that decoding is not recorded
            assert torch.equal(student.generate(prompt, **options), wanted)
        assert Tape.made == made + steps + (number > 0)
    assert "_prefill" not in vars(student.model)
    padded = torch.ones_like(prompt)
    padded[:, :2] = 0
    hidden = dict(output_hidden_states=True, return_dict_in_generate=True)
    for more in (dict(attention_mask=padded), hidden, dict(num_beams=2), dict(use_cache=False)):
        wanted = student.model.generate(prompt, **options, **more)
        found = student.generate(prompt, **options, **more)
        assert torch.equal(*(x if isinstance(x, Tensor) else x.sequences for x in (found, wanted)))
    assert Tape.made == made + steps + 1, "these prompts are read as ever"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["token-substitute", "layer-drop-odd-weighted", "token-and-channel"])
def test_cuda_graphs_read_what_the_model_reads(kind: str, rows: int) -> None:
    student = make("llama", ROUTERS[kind]).to("cuda")
    (read, plainly), replays = reading(student, None), []
    for ids in texts(rows, 40, 37, 48, 48, 43):
        torch.testing.assert_close(read(ids.cuda()).logits, plainly(ids.cuda()).logits, **CLOSE)
        replays += [replay for _, replay in student._decoding._texts.kept.values()]
    assert replays and None not in replays
