"""Linear layers with packed weights give the bits of plain ones in every call that a student makes."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from elastic import run
from students import LoraSpec, Student, elasticize
from students.architectures.lookup import weight_of
from students.execution.linear import RoutedLinear
from students.kernels.packing import PackedLinear, PackedProduct, pack_linears, prepare_linears
from tests.pico.language import TINY, make_tiny
from tests.students.test_execution import SPECS, decode
from tests.students.test_students import scramble


def make_linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias).bfloat16().requires_grad_(False)


def packed(linear: nn.Linear) -> nn.Linear:
    model = nn.Sequential(copy.deepcopy(linear))
    if not pack_linears(model):
        pytest.skip("no bfloat16 products of oneDNN on this CPU")
    prepare_linears(model)
    return model[0]


def fresh(student: Student) -> int:
    """Return the number of layers whose packed weights are up to date."""
    layers = [module for module in student.model.modules() if isinstance(module, PackedLinear)]
    return sum(layer.product.holds(layer.weight) for layer in layers)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_any_shape_gives_the_same_bits(bias: bool):
    for inputs, outputs in itertools.product((1, 5, 32, 192, 333), (1, 3, 64, 100, 577)):
        plain = make_linear(inputs, outputs, bias)
        other = packed(plain)
        for shape in ((1,), (7,), (2, 3), (50,), (256,), (300,), (0,)):
            x = torch.randn(*shape, inputs).bfloat16()
            assert torch.equal(other(x), plain(x)), (inputs, outputs, shape)
        assert torch.equal(other(x.new_ones(4, 2 * inputs)[:, ::2]), plain(x.new_ones(4, inputs)))


@torch.no_grad()
def test_a_weight_that_changes_is_packed_again():
    plain = make_linear(64, 32)
    other, x = packed(plain), torch.randn(3, 64).bfloat16()
    other(x)
    for linear in (plain, other):
        linear.weight.mul_(2)
    assert torch.equal(other(x), plain(x))
    prepare_linears(other)
    assert torch.equal(other(x), plain(x))
    for linear in (plain, other):
        linear.weight.data = linear.weight * 3
    assert torch.equal(other(x), plain(x))
    prepare_linears(other)
    assert torch.equal(other(x), plain(x))
    other.weight.data = other.weight.data.T.contiguous().T
    torch.testing.assert_close(other(x), plain(x))


def test_gradients_copies_counters_and_compilers_meet_a_plain_layer():
    plain = make_linear(64, 32)
    other, x = packed(plain), torch.randn(3, 64).bfloat16().requires_grad_()
    with torch.no_grad():
        expected = other(x)
        again = copy.deepcopy(other)
        assert torch.equal(again(x), expected)
        with FlopCounterMode(display=False) as flops:
            assert torch.equal(other(x), expected)
        assert torch.equal(torch.compile(other, backend="eager", fullgraph=True)(x), expected)
    assert flops.get_total_flops() == 2 * 3 * 64 * 32
    other(x).sum().backward()
    torch.testing.assert_close(x.grad, plain.weight.sum(0).expand(3, -1))
    assert other.state_dict().keys() == plain.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "mixed") for name in sorted(TINY)),
        *itertools.product(("llama", "phi3", "gpt_neox"), ("channel", "token-drop", "layer-drop", "head")),
    ],
)
def test_a_student_on_packed_weights_is_the_same(name: str, kind: str, tokens: torch.Tensor):
    """Without corrections, which change the rounding (see below)."""
    spec = replace(SPECS[kind], lora=LoraSpec())
    plain, other = (scramble(elasticize(make_tiny(name).bfloat16(), spec)).train(False) for _ in range(2))
    if not other.pack() and name != "gpt2":  # gpt2 has no nn.Linear but its head
        pytest.skip("no bfloat16 products of oneDNN on this CPU")
    assert torch.equal(plain(tokens)[0].logits, other(tokens)[0].logits)
    assert fresh(other) or name == "gpt2"
    assert torch.equal(decode(plain, tokens, None, 5), decode(other, tokens, None, 5))
    with plain.teacher(), other.teacher():
        assert torch.equal(plain(tokens)[0].logits, other(tokens)[0].logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_corrections_are_added_to_copies_of_their_weights(name: str, tokens: torch.Tensor):
    plain, other = make_open(name, torch.bfloat16), make_open(name, torch.bfloat16)
    other.pack()
    layers = [module for module in other.modules() if isinstance(module, RoutedLinear)]
    for scale in (1.0, -3.0):  # the second time, earlier sums are stale
        for student in (plain, other):
            for key, parameter in student.added_parameters().items():
                parameter.mul_(scale if "lora" in key else 1.0)
        assert not torch.equal(plain(tokens)[0].logits, other(tokens)[0].logits)  # rounding
        for layer in layers:
            x, lora = torch.randn(1, 3, layer.inputs).bfloat16(), layer.lora
            whole = (weight_of(layer).float() + lora.up @ lora.down).bfloat16().contiguous()
            assert torch.equal(layer(x), F.linear(x, whole, layer.base_layer.bias))
            with FlopCounterMode(display=False) as counter:
                layer(x)
            assert counter.get_total_flops() == 6 * sum(part.numel() for part in (whole, lora.up, lora.down))
    assert layers
    for student in (plain, other):
        student.runtime.offset = 1e6, 2e6  # rows of their own: corrections apart
    assert torch.equal(plain(tokens)[0].logits, other(tokens)[0].logits)
    with plain.teacher(), other.teacher():
        assert torch.equal(plain(tokens)[0].logits, other(tokens)[0].logits)


@torch.no_grad()
def test_in_float32_corrections_stay_apart(tokens: torch.Tensor):
    plain, other = (make_open("llama", torch.float32) for _ in range(2))
    other.pack()
    assert torch.equal(plain(tokens)[0].logits, other(tokens)[0].logits)


def add_corrections(student: Student) -> None:
    """Add corrections to copies of their weights in float32 too, where tests can tell errors from rounding."""
    for module in student.modules():
        if isinstance(module, RoutedLinear) and module.lora is not None:
            module._together.prepare(weight_of(module), module.lora.down, module.lora.up)


def make_open(name: str, dtype: torch.dtype) -> Student:
    """Return a student with corrections whose gates are all open, so that rounding closes none."""
    student = scramble(elasticize(make_tiny(name).to(dtype), SPECS["token-drop"])).train(False)
    student.runtime.offset = 1e6
    return student


def test_only_frozen_layers_in_bfloat16_are_packed():
    assert not pack_linears(nn.Sequential(nn.Linear(4, 4)))
    student = elasticize(make_tiny("llama").bfloat16(), SPECS["token-drop"])
    student.pack()
    added = [module for name, module in student.model.named_modules() if "routers" in name.split(".")]
    assert added and not any(isinstance(module, PackedLinear) for module in added)


@torch.no_grad()
def test_weights_are_packed_by_whoever_reads_them(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    student = scramble(elasticize(make_tiny("llama").bfloat16(), SPECS["channel"])).train(False)
    student(tokens)  # before packing
    if not student.pack():
        pytest.skip("no bfloat16 products of oneDNN on this CPU")
    student(tokens.repeat(1, 30)[:, :200].repeat(2, 1))  # too many rows for packed weights
    assert fresh(student) == 0
    student.prepare()
    head = fresh(student)  # the head's only: other layers are joined side by side
    packed = []
    monkeypatch.setattr(PackedProduct, "prepare", lambda product, weight: packed.append(product))
    student(tokens)
    assert head == 1 and not packed
    monkeypatch.undo()
    with student.teacher():
        student(tokens)
    assert fresh(student) == sum(isinstance(module, PackedLinear) for module in student.model.modules())


def test_a_second_copy_needs_room(monkeypatch: pytest.MonkeyPatch):
    model = nn.Linear(100, 10, bias=False)
    for free, room in ((8000, True), (7999, False)):
        monkeypatch.setattr(run, "free_memory", lambda device, free=free: free)
        assert run.has_room_for_two(model) == room
        assert not run.has_room_for_two(model, 1)


@torch.no_grad()
def test_a_packed_layer_is_the_plain_one_until_that_is_put_back(tokens: torch.Tensor):
    model = make_tiny("llama").bfloat16().requires_grad_(False)
    before, names = model(tokens).logits, list(dict(model.named_parameters()))
    plain = dict(model.named_modules())
    if not pack_linears(model):
        pytest.skip("no bfloat16 products of oneDNN on this CPU")
    found = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert found and list(dict(model.named_parameters())) == names and not pack_linears(model)
    seen = []
    for name, module in found.items():
        assert module.plain is plain[name] and module.weight is plain[name].weight
        plain[name].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(model(tokens).logits, before) and len(seen) == len(found)
    for name, module in found.items():
        model.set_submodule(name, module.plain)
    assert torch.equal(model(tokens).logits, before)
