"""Sharded weights, whole only while they are read, give the results of whole ones, and free their memory in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from students import RouterSpec, Student, StudentSpec, elasticize
from students.shards import Shards, are_spread, open_unit, part_of
from tests.pico.language import make_tiny

CPU = torch.device("cpu")
SPEC = StudentSpec((RouterSpec("channel"), RouterSpec("token", substitute=4), RouterSpec("vocab", rank=8)))


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Shard the weights of a model in place, in units, for a single process; return the model."""
    shards = Shards(0, 1, lambda buffer: lambda: None, CPU, CPU)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    for modules in [*([block] for block in model.model.layers), ends]:
        shards.spread(modules)
    return model


def present(model: nn.Module) -> set[str]:
    """Return the names, cut after three parts, of the sharded weights that are whole in memory."""
    units = {n: w for n, w in model.named_parameters() if hasattr(w, "unit")}
    return {".".join(n.split(".")[:3]) for n, w in units.items() if w.untyped_storage().nbytes()}


def gradients(student: Student, ids: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return loss and gradients of a training step in which the LM head is called apart from the trunk."""
    student.train()
    with student.teacher(), torch.no_grad():
        taught = student.features(ids)[0].last_hidden_state
    hidden = student.features(ids)[0].last_hidden_state
    logits = student.logits(hidden.flatten(0, 1), *student.head_tensors())[0]
    loss = (logits - student.logits(taught.flatten(0, 1))[0]).square().mean()
    loss.backward()
    student.eval()
    return loss.detach(), {name: p.grad for name, p in student.added_parameters().items()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_spread_model_learns_what_a_whole_one_does(recompute: bool, tied: bool, tokens: Tensor):
    students = []
    for make in (lambda model: model, spread):
        torch.manual_seed(0)
        student = elasticize(make(make_tiny("llama", tie_word_embeddings=tied)), SPEC)
        for parameter in student.added_parameters().values():
            torch.nn.init.normal_(parameter, std=0.3)
        student.runtime.execution = "mask"
        if recompute:
            student.checkpoint_blocks()
        students.append(student)
    (loss, whole), (other, parts) = (gradients(student, tokens) for student in students)
    assert torch.equal(loss, other) and whole.keys() == parts.keys()
    for name in whole:
        assert whole[name] is None or torch.equal(whole[name], parts[name]), name
    student = students[1]
    assert present(student.model) == {"model.layers.0"}, "more is in memory than the last block of the way back"
    assert sum(p.numel() for p in student.model.parameters()) == sum(p.numel() for p in students[0].model.parameters())
    with torch.no_grad():
        assert torch.equal(*(each(tokens)[0].logits for each in students))


def test_a_spread_student_is_not_laid_out_for_skipping(tokens: Tensor):
    student = elasticize(spread(make_tiny("llama")), SPEC)
    assert student.runtime.execution == "mask" and are_spread(student.model)
    student.runtime.execution = "skip"
    with torch.no_grad(), pytest.raises(ValueError, match="execute as masks"):
        student(tokens)


def test_copies_on_the_same_weights_have_the_same_units(tokens: Tensor):
    model = spread(make_tiny("llama")).requires_grad_(False)
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, other(tokens).logits)
        model.model(tokens)
    ends = {"model.embed_tokens.weight", "lm_head.weight"}  # gathered ahead: it always followed the last block
    assert present(model) == present(other) == {"model.layers.2"} | ends
    open_unit(other.model.layers[0].mlp)
    assert present(model) == {"model.layers.0"}


def test_the_next_unit_is_on_its_way_while_one_computes():
    """One unit is gathered ahead, in forward and backward, but none where the order of units has varied."""
    begun: list[int] = []
    waited: list[int] = []

    def gather(buffer: Tensor) -> Callable[[], None]:
        number = next(n for n, layer in enumerate(layers) if layer.weight.data_ptr() == buffer.data_ptr())
        begun.append(number)
        return lambda: waited.append(number)

    layers = [nn.Linear(3, 3, bias=False) for _ in range(4)]
    shards = Shards(0, 1, gather, CPU, CPU)
    for layer in layers:
        shards.spread([layer])
    forward, back = [0, 1, 2, 3], [2, 1]
    for number in 2 * (forward + back):
        open_unit(layers[number])
        assert waited[-1] == number
        assert sum(bool(layer.weight.untyped_storage().nbytes()) for layer in layers) <= 2
    assert waited == 2 * (forward + back) and begun == [*waited, 0]
    for number in 2 * forward:  # without backward
        open_unit(layers[number])
    assert begun == waited == 2 * (forward + back) + forward + [2] + forward, "2 is gathered in vain once"
    shards.close()
    assert not any(layer.weight.untyped_storage().nbytes() for layer in layers)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_of_all_processes_are_the_weights(size: int):
    """The parts of all processes together are the weights, for several types and odd sizes, and for a scalar."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        parts = nn.ModuleList([nn.Linear(5, 7).half(), nn.LayerNorm(3), nn.Linear(11, 9).double()])
        parts.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
        return parts.requires_grad_(False)

    found: list[Tensor] = []
    pieces = [weight.new_empty(0) for weight in make().parameters()]
    for rank in range(size):
        model = make()
        shards = Shards(
            rank, size, lambda buffer, rank=rank: partial(found.append, buffer.chunk(size)[rank].clone()), CPU, CPU
        )
        shards.spread([model])
        open_unit(model)
        pieces = [torch.cat(pair) for pair in zip(pieces, map(part_of, model.parameters()), strict=True)]
    shards.gather = lambda buffer: lambda: buffer.copy_(torch.cat(found))
    shards.close()
    open_unit(model)
    for weight, piece, expected in zip(model.parameters(), pieces, make().parameters(), strict=True):
        assert torch.equal(weight, expected) and torch.equal(piece, expected.flatten())
