"""In decode steps that save nothing, a student launches hardly more operators than the dense model."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from students import LoraSpec, RouterSpec, StudentSpec
from students.execution.attention import route_trunk
from students.families.language import LanguageStudent
from students.kernels import devices, ops
from students.libraries import cache_of
from students.recording.decoding import Decoding
from students.recording.prompt import Read
from tests.pico.language import make_tiny
from tests.students.host_waits import Launches
from tests.students.test_execution import CLOSE, make

pytestmark = pytest.mark.usefixtures("no_gradients")

DEFAULT = (RouterSpec("channel"), RouterSpec("vocab", rank=5))


def student_of(*routers: RouterSpec, lora: int = 0, blocks: int = 3) -> LanguageStudent:
    student = make("llama", StudentSpec(routers, LoraSpec(lora)), num_hidden_layers=blocks)
    assert isinstance(student, LanguageStudent)
    return student


def of_a_block(make_decoding: object, rows: int) -> Counter[str]:
    """Return the operators that one more block launches in a decode step of so many rows."""
    counted = []
    for blocks in (2, 3):
        decoding: Decoding = make_decoding(blocks)
        tokens = torch.randint(3, 120, (rows, 7), generator=torch.Generator().manual_seed(0))
        out = decoding.model(tokens, use_cache=True)
        step, run = decoding._begin(Read(out.logits[:, -1], cache_of(out)), None, 1)
        step.advance(tokens[:, 0])
        run()
        step.advance(tokens[:, 0])
        with Launches() as launches:
            run()
        assert not launches.waits
        counted.append(launches.launched)
    return counted[1] - counted[0]


def dense(blocks: int, fast: bool = False) -> Decoding:
    """Return the decoding of a dense model; fast: with the faster attention of one that is timed against a student."""
    model = make_tiny("llama", num_hidden_layers=blocks)
    if fast:
        route_trunk(model.model)
    return Decoding(model, model.model, recorder=lambda work: work)


def routed(blocks: int, *routers: RouterSpec, lora: int = 0, bypass: bool = False) -> Decoding:
    student = student_of(*routers, lora=lora, blocks=blocks)
    student.runtime.bypass = bypass
    student._decoding.recorder = lambda work: work
    return student._decoding


def test_an_open_student_launches_what_the_dense_model_does() -> None:
    assert of_a_block(lambda n: routed(n, *DEFAULT, bypass=True), 2) == of_a_block(dense, 2)


def test_queries_and_keys_are_rotated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "compiled", lambda x: False)
    before = of_a_block(dense, 1)
    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)
    monkeypatch.setattr(ops, "compiled", lambda x: True)
    monkeypatch.setattr(ops, "attends_to_cache", lambda *given: False)
    after = of_a_block(dense, 1)
    assert after["elastic.rotary.default"] == 1 and sum(before.values()) - sum(after.values()) == 9
    of_student = of_a_block(lambda n: routed(n, RouterSpec("channel")), 1)
    assert of_student["elastic.rotary.default"] == 1


def test_attention_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of_a_block(lambda n: routed(n, RouterSpec("channel")), 1)
    monkeypatch.setattr(ops, "attends_to_cache", lambda *given: given[3] is not None)
    after = of_a_block(lambda n: routed(n, RouterSpec("channel")), 1)
    assert after - before == {"elastic.decode_attention.default": 1} and sum((before - after).values()) == 1
    with_it = of_a_block(lambda n: dense(n, fast=True), 1)
    assert with_it["elastic.decode_attention.default"] == 1
    assert of_a_block(lambda n: routed(n, RouterSpec("channel"), bypass=True), 1) == with_it


def test_where_all_weights_are_read_only_masks_are_more() -> None:
    """In a batch that runs as dense products, a student launches four gates per block and otherwise less."""
    many, plain = of_a_block(lambda n: routed(n, *DEFAULT), 16), of_a_block(dense, 16)
    more, less = many - plain, plain - many
    assert more == {"elastic.channel_gate.default": 4} and sum(less.values()) >= 3
    assert "aten.mm.default" in less, "layers that read the same channels are one product"


def test_so_many_rows_as_the_table_says_read_what_one_of_them_needs(
    tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that are small enough read a channel if any of their rows needs it."""
    student = student_of(*DEFAULT, lora=2)
    batch = tokens.view(8, 3)
    cache = cache_of(student.model(batch[:, :2], use_cache=True))
    ran = []
    few = ops.few_channels
    monkeypatch.setattr(ops, "few_channels", lambda x, *rest: ran.append(len(x)) or few(x, *rest))
    monkeypatch.setattr(ops, "reads_few", lambda rows, *_: rows <= 8)
    some = student(batch[:, 2:], use_cache=True, past_key_values=cache)[0].logits
    assert ran and set(ran) == {8}
    student.runtime.execution = "mask"
    whole = student.model(batch, use_cache=False).logits[:, 2:]
    torch.testing.assert_close(whole, some, **CLOSE)
