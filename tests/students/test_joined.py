"""Layers that read some channels are fused with the norm, gate and residual addition around them, as on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from students import LoraSpec, RouterSpec, StudentSpec
from students.families.language import LanguageStudent
from students.kernels import devices, ops
from students.kernels.deferred import Deferred, Stream, entering, gate, gated, output, settled, summand
from students.libraries import cache_of, with_cache
from students.recording.decoding import Decoding
from tests.backends import running_on
from tests.students.tape import Tape
from tests.students.test_execution import CLOSE, make
from tests.students.test_launches import DEFAULT, of_a_block, student_of

JOINED = {"llama": {-1, 0, 3}, "phi3": {-1, 0}, "gemma2": {-1, 4}, "cohere2": {-1, 3}, "gpt2": {-1}}
"""Kinds of inputs (see `ops.fused_channels`) that occur in each model: norms of the residual stream, gated MLPs."""


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the code paths of a GPU, whatever backend runs the operators; without autograd."""
    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)
    monkeypatch.setattr(ops, "compiled", lambda x: True)
    monkeypatch.setattr(ops, "reads_few", lambda rows, *_: rows <= 8)
    with torch.no_grad():
        yield


def in_steps(student: LanguageStudent, tokens: Tensor) -> Tensor:
    """Return the logits of the last three tokens, decoded one at a time."""
    out = student.model(tokens[:, :-3], use_cache=True)
    found = []
    for step in range(3, 0, -1):
        one = tokens[:, -step : tokens.shape[1] - step + 1]
        out = student.model(one, **with_cache(student.model, {"use_cache": True}, cache_of(out)))
        found.append(out.logits)
    return torch.cat(found, 1)


def both_ways(student: LanguageStudent, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of the last three tokens by masks in one pass, and by skipping one token at a time."""
    student.runtime.execution = "mask"
    whole = student.model(tokens, use_cache=False).logits[:, -3:]
    student.runtime.execution = "skip"
    return whole, in_steps(student, tokens)


@pytest.mark.parametrize("name", JOINED)
def test_decoding_says_what_masks_say(name: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, Tensor | None]] = []
    call = ops.fused_channels
    monkeypatch.setattr(ops, "fused_channels", lambda *given: calls.append(given[4:6]) or call(*given))
    student = make(name, StudentSpec(DEFAULT, LoraSpec(2)), num_hidden_layers=2)
    for rows in (1, 2):
        torch.testing.assert_close(*both_ways(student, tokens[:rows]), **CLOSE)
    assert {kind for kind, _ in calls} == JOINED[name]
    assert (name in ("gemma2",)) == all(residual is None for _, residual in calls)


@pytest.mark.parametrize("name", JOINED)
def test_many_tokens_say_what_masks_say(name: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all weights are read, the launch that masks channels includes the same operators in front of the layers."""
    calls: list[tuple[Tensor | None, float, int]] = []
    call = ops.fused_gate
    monkeypatch.setattr(ops, "fused_gate", lambda *given: calls.append(given[2:5]) or call(*given))
    student = make(name, StudentSpec(DEFAULT), num_hidden_layers=2)
    student.runtime.execution = "mask"
    whole = student.model(tokens, use_cache=False, output_hidden_states=True)
    student.runtime.execution = "skip"
    some = student.model(tokens, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(some.logits, whole.logits, **CLOSE)
    for one, other in zip(some.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(settled(one), other, **CLOSE)
    assert {kind for *_, kind in calls} == JOINED[name] - {-1}
    assert all((residual is not None) == (kind < 3) for residual, _, kind in calls)


def test_beside_other_routers(tokens: Tensor) -> None:
    """Fused layers agree with masks also where other routers skip tokens, heads and experts."""
    routers = RouterSpec("channel"), RouterSpec("token", substitute=2), RouterSpec("head"), RouterSpec("expert")
    student = make("llama", StudentSpec(routers, LoraSpec(2)), num_hidden_layers=2)
    torch.testing.assert_close(*both_ways(student, tokens), **CLOSE)


def test_in_kernels(tokens: Tensor) -> None:
    """Fused layers agree with masks in Triton's kernels, too."""
    student = make("llama", StudentSpec((RouterSpec("channel"),)), num_hidden_layers=1)
    whole, _ = both_ways(student, tokens[:, :4])
    with running_on("interpreter", None):
        torch.testing.assert_close(in_steps(student, tokens[:, :4]), whole, **CLOSE)


def decoding_of(blocks: int, opened: bool = False) -> Decoding:
    student = student_of(*DEFAULT, blocks=blocks)
    student.prepare()
    student.runtime.bypass = opened
    student._decoding.recorder = lambda work: work
    return student._decoding


@pytest.mark.parametrize(("rows", "opened"), [(1, False), (4, False), (1, True)])
def test_a_block_launches_seven_times(rows: int, opened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block launches seven operators in a decode step; opened: with all gates open, at compute 1.0."""
    monkeypatch.setattr(ops, "observed", lambda: False)
    launched = of_a_block(lambda blocks: decoding_of(blocks, opened), rows)
    assert launched["elastic.fused_channels.default"] == 4
    assert sum(launched.values()) == 7, "and rotary embeddings, the cache and attention"


def test_a_block_launches_eleven_times_where_all_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the rows that read some channels, a block launches fewer operators than the dense model's sixteen."""
    monkeypatch.setattr(ops, "observed", lambda: False)
    launched = of_a_block(decoding_of, 16)
    assert (launched["elastic.fused_gate.default"], launched["aten.mm.default"]) == (3, 4)
    assert launched["elastic.channel_gate.default"] == 1, "the gate behind attention"
    assert sum(launched.values()) == 11, "and rotary embeddings, the cache and attention"


@pytest.mark.parametrize("opened", [False, True])
def test_recorded_steps(opened: bool, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded steps with fused layers generate the tokens of unrecorded steps without."""
    student = make("llama", StudentSpec(DEFAULT, LoraSpec(2)))
    assert isinstance(student, LanguageStudent)
    student.prepare()
    student.runtime.bypass = opened
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    for rows in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(devices, "runs_ahead", lambda device: False)
            plain = student.model.generate(tokens[:rows], **options)
        student._decoding.recorder = Tape
        assert torch.equal(student.generate(tokens[:rows], **options), plain)


# Deferred results, which stand in for tensors.


def make_output(added: list[Tensor | None]) -> Deferred:
    def launch(residual: Tensor | None) -> tuple[Tensor, Tensor]:
        added.append(residual)
        out = torch.full((2, 1, 4), 3.0)
        return out if residual is None else out + residual, torch.ones(2, 1)

    return output(torch.Size([2, 1, 4]), torch.zeros(()), launch)


def test_who_looks_finds_a_tensor() -> None:
    """Any operation on a deferred output has it computed, once."""
    for look in (
        lambda x: x[:, -1:] * 1,
        lambda x: torch.cat([x]),
        lambda x: F.linear(x, torch.eye(4)),
        lambda x: x.view(2, 1, 4),
        lambda x: x.clone(),
        lambda x: x + 0.0,
        lambda x: 1.0 * x,
        lambda x: x.add_(torch.zeros(4)),
    ):
        added: list[Tensor | None] = []
        out = make_output(added)
        assert out.shape == (2, 1, 4) and out.dtype == torch.float32 and len(out) == 2 and not added
        found = look(out)
        assert not isinstance(found, Deferred) and added == [None] and found.flatten().tolist() == [3.0] * 8
        assert torch.equal(out, found) and len(added) == 1, "it is computed once"


def test_a_residual_stream_is_added_on_the_way() -> None:
    """Adding a deferred output to the residual stream is deferred, too, and done by the kernel of the output."""
    added: list[Tensor | None] = []
    stream = torch.ones(2, 1, 4)
    for out in (make_output(added), make_output(added)):
        stream = stream + out if len(added) else out + stream
        assert isinstance(stream, Stream)
    assert len(added) == 1, "the next one waits"
    assert settled(stream).flatten().tolist() == [7.0] * 8 and entering(stream).kind == -1
    norm = stream.normed(torch.ones(4), 1e-5, 0, lambda x, weight: x * weight)
    given = entering(norm)
    assert (given.kind, given.epsilon) == (0, 1e-5) and torch.equal(given.x, stream.flatten(0, 1))
    assert torch.equal(norm * 1, stream * 1) and entering(norm).kind == -1, "who computes it, computes it for all"


def test_a_sum_is_normalised_on_the_way() -> None:
    """The sum of an output that is computed and the residual stream is made by the norm's kernel, or without it."""
    residual, out, limit = torch.randn(2, 1, 4), torch.randn(2, 1, 4), torch.full((4,), 0.5)
    for first in (True, False):
        stream = residual + summand(out)
        assert isinstance(stream, Stream) and stream.made is None
        norm = stream.normed(torch.ones(4), 1e-5, 1, lambda x, weight: F.rms_norm(x, (4,), weight, 1e-5))
        if first:
            assert torch.equal(stream * 1, residual + out)
        expected = F.rms_norm(residual + out, (4,), torch.ones(4), 1e-5)
        torch.testing.assert_close(gated(norm, limit), (expected * (expected.abs() >= 0.5)).flatten(0, 1))
        assert stream.made is not None and torch.equal(stream * 1, residual + out)
        torch.testing.assert_close(norm * 1, expected)


def test_gate_and_up() -> None:
    """Activation and product of a gated MLP are deferred, and give their plain values when read."""
    shut, up = torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    for kind, activation in enumerate((F.silu, torch.nn.GELU(approximate="tanh"))):
        active = activation(gate(shut))
        assert isinstance(active, Deferred) and torch.equal(active * 1, activation(shut))
        product = up * activation(gate(shut))
        assert isinstance(product, Deferred) and entering(product).kind == 3 + kind
        assert torch.equal(product + 0, up * activation(shut)) and entering(product).kind == -1
    out = make_output([])
    assert F.dropout(out, 0.5, training=False) is out
    assert not isinstance(F.gelu(gate(shut)), Deferred)
