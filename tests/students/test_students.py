"""Invariants of students on tiny models: open == teacher, causal, independent of padding, only routers learn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from students import LoraSpec, RouterSpec, Student, StudentSpec, elasticize
from students.architectures.lookup import architecture_of
from students.checkpoint import read_tensors, write_tensors
from tests.pico import image
from tests.pico.language import make_tiny

EVERY_KIND = {
    "token": RouterSpec("token", substitute=4),
    "token-drop": RouterSpec("token", sites=("attn",), kv="drop"),
    "token-sequence": RouterSpec("token", granularity="sequence", network="mlp", hidden=4),
    "token-topk": RouterSpec("token", selection="topk", weight="score"),
    "head": RouterSpec("head"),
    "head-topk": RouterSpec("head", selection="topk", weight="score"),
    "expert": RouterSpec("expert", groups=6),
    "expert-topk": RouterSpec("expert", groups=6, selection="topk", weight="score"),
    "channel": RouterSpec("channel"),
    "channel-static": RouterSpec("channel", network="static"),
    "neuron": RouterSpec("neuron"),
    "layer": RouterSpec("layer", substitute=4),
    "layer-drop": RouterSpec("layer", kv="drop", blocks="odd"),
    "vocab": RouterSpec("vocab", rank=5),
}
MIXED = StudentSpec(
    (
        RouterSpec("token", kv="drop", substitute=3),
        RouterSpec("head"),
        RouterSpec("expert", groups=5),
        RouterSpec("channel"),
        RouterSpec("layer", blocks="odd"),
        RouterSpec("vocab", rank=5),
    ),
    LoraSpec(2),
)


def scramble(student: Student, scale: float = 1.0) -> Student:
    """Randomise the routers of a student, so that about half of all gates close; return the student."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, buffer in student.model.named_buffers():
            if ".vocab." in name:
                buffer.normal_(0, scale)
        for name, parameter in student.added_parameters().items():
            if name.endswith("log_limit"):
                parameter.normal_(-0.7, 0.5)
            elif name.endswith("vocab.spread"):
                parameter.zero_()
            else:
                parameter.normal_(0, scale)
    return student


def left_over(student: Student) -> list[tuple[str, Any]]:
    """Return the values that a block's wrappers have stored for each other and not taken out again."""
    blocks = student.runtime.contexts
    parts = [part for block in blocks for part in (block, block.attn, block.mlp, *block.linear_groups)]
    found = [(f.name, getattr(part, f.name)) for part in parts for f in fields(part)]
    found = [(name, value) for name, value in found if name not in ("attn", "mlp", "linear_groups")]
    return [
        (name, v)
        for name, v in found
        if v is not None and v not in (0, {}) and not (isinstance(v, list) and not any(x is not None for x in v))
    ]


@pytest.fixture(params=sorted(EVERY_KIND))
def spec(request: pytest.FixtureRequest) -> StudentSpec:
    return StudentSpec((EVERY_KIND[request.param],), LoraSpec(2))


def open_student_of(model: PreTrainedModel, tokens: torch.Tensor, padding: torch.Tensor) -> Student:
    """Return a student with routers in all places, after asserting that their gates are open and change no bit."""
    before = model(tokens, attention_mask=padding, output_hidden_states=True)
    routers = [EVERY_KIND[kind] for kind in ("head", "expert", "channel", "layer", "vocab")]
    student = elasticize(model, StudentSpec((RouterSpec("token", substitute=2), *routers), LoraSpec(2)))
    after, decisions = student(tokens, padding, output_hidden_states=True)
    assert torch.equal(before.logits, after.logits)
    assert all(torch.equal(a, b) for a, b in zip(before.hidden_states, after.hidden_states, strict=True))
    zeros = model.config.model_type in ("nemotron", "arcee", "jais2", "nanochat")  # of ReLU^2, below any limit
    shares = {key: share.expand(tokens.shape)[padding.bool()] for key, share in decisions.share.items()}
    assert all((share == 1).all() for key, share in shares.items() if not (zeros and "mlp_out" in key))
    return student


def test_open_student_is_the_teacher_bit_for_bit(any_model, tokens, padding):
    text = any_model.generate(tokens, max_new_tokens=4, do_sample=False, attention_mask=padding)
    student = open_student_of(any_model, tokens, padding)
    assert torch.equal(text, student.model.generate(tokens, max_new_tokens=4, do_sample=False, attention_mask=padding))


def test_open_drop_and_topk_agree_with_the_teacher(any_model, tokens):
    before = any_model(tokens).logits
    routers = [EVERY_KIND[n] for n in ("token-drop", "layer-drop", "head-topk", "expert-topk", "channel-static")]
    student = elasticize(any_model, StudentSpec(tuple(routers)))
    after, _ = student(tokens)
    torch.testing.assert_close(before, after.logits, atol=1e-5, rtol=1e-4)


def test_logits_are_the_models_own(any_model, tokens):
    student = scramble(elasticize(any_model, StudentSpec((RouterSpec("vocab", rank=5), RouterSpec("channel")))))
    whole, decisions = student(tokens)
    hidden, _ = student.features(tokens)
    rows, share = student.logits(hidden.last_hidden_state.flatten(0, 1), *student.head_tensors())
    torch.testing.assert_close(whole.logits.flatten(0, 1), rows, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decisions.share["vocab"].flatten(), share)


def test_teacher_context_bypasses_every_router(any_model, tokens):
    before = any_model(tokens).logits
    student = scramble(elasticize(any_model, MIXED))
    assert not torch.allclose(before, student(tokens)[0].logits, atol=1e-3)
    with student.teacher():
        assert torch.equal(before, student(tokens)[0].logits)


def test_every_kind_routes(llama, tokens, spec):
    before = llama(tokens).logits
    student = scramble(elasticize(llama, spec)).train(False)
    student.runtime.capacity = 0.5
    out, decisions = student(tokens)
    assert not torch.allclose(before, out.logits, atol=1e-3)
    assert 0 < student.compute.ratio(decisions, torch.ones_like(tokens, dtype=torch.bool), "decode").item() < 1.2
    assert not left_over(student) and student.runtime.decisions is None


@pytest.mark.parametrize("place", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
@pytest.mark.parametrize("kind", [*sorted(EVERY_KIND), "mixed"])
def test_a_pass_that_fails_leaves_nothing_behind(kind: str, place: str, llama, tokens):
    student = scramble(elasticize(llama, MIXED if kind == "mixed" else StudentSpec((EVERY_KIND[kind],)))).train(False)
    student.runtime.capacity = 0.5
    with torch.no_grad():
        before = student(tokens)[0].logits

    def fail(*_: Any) -> None:
        raise ArithmeticError

    with student.blocks[-1].get_submodule(place).register_forward_hook(fail):
        for execution in ("skip", "mask"):
            student.runtime.execution = execution
            for grad in (False, True):
                with torch.set_grad_enabled(grad), pytest.raises(ArithmeticError):
                    student(tokens)
                assert not left_over(student) and student.runtime.decisions is None
    student.runtime.execution = "skip"
    with torch.no_grad():
        assert torch.equal(student(tokens)[0].logits, before)


def test_later_tokens_change_no_earlier_logit(any_model, tokens):
    student = scramble(elasticize(any_model, MIXED))
    later = tokens.clone()
    later[:, 8:] = 5
    first, second = (student(t)[0].logits for t in (tokens, later))
    torch.testing.assert_close(first[:, :8], second[:, :8], atol=1e-4, rtol=1e-3)


def test_sequence_decisions_look_at_the_prompt_only(llama, tokens):
    student = scramble(elasticize(llama, StudentSpec((EVERY_KIND["token-sequence"],))))
    prompt = torch.zeros_like(tokens, dtype=torch.bool)
    prompt[:, :5] = True
    later = tokens.clone()
    later[:, 8:] = 5
    first, second = (student(t, prompt=prompt)[0].logits for t in (tokens, later))
    torch.testing.assert_close(first[:, :8], second[:, :8])


def test_padding_and_batch_mates_change_nothing(any_model, tokens):
    student = scramble(elasticize(any_model, MIXED))
    alone, _ = student(tokens[:1, :9])
    padded = torch.zeros_like(tokens)
    padded[0, 3:] = tokens[0, :9]
    padded[1] = tokens[1]
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batched, _ = student(padded, mask, use_cache=False, position_ids=positions)
    torch.testing.assert_close(alone.logits[0], batched.logits[0, 3:], atol=1e-4, rtol=1e-3)


def test_sequence_decisions_ignore_padding(llama, tokens, padding):
    student = scramble(elasticize(llama, StudentSpec((EVERY_KIND["token-sequence"],))))
    other = tokens.where(padding.bool(), 9)
    first, second = (student(t, padding)[0].logits[0, 4:] for t in (tokens, other))
    torch.testing.assert_close(first, second)


def test_only_what_was_added_learns(any_model, tokens):
    frozen = {n: p.clone() for n, p in any_model.named_parameters()}
    student = scramble(elasticize(any_model, MIXED), 0.1).train()
    added = student.added_parameters()
    optimizer = torch.optim.SGD(added.values(), lr=0.1)
    out, decisions = student(tokens)
    compute = student.compute.ratio(decisions, torch.ones_like(tokens, dtype=torch.bool), "decode")
    (out.logits.float().logsumexp(-1).mean() + compute).backward()
    assert [n for n, p in student.named_parameters() if p.requires_grad] == [f"model.{n}" for n in added]
    assert not [n for n, p in added.items() if p.grad is None]
    optimizer.step()
    base = {n.replace(".base_layer", ""): p for n, p in student.model.named_parameters() if n not in added}
    assert base.keys() == frozen.keys() and all(torch.equal(frozen[n], p) for n, p in base.items())


def test_student_never_enters_training_mode_of_the_frozen_model():
    student = elasticize(make_tiny("gpt2"), StudentSpec((RouterSpec("token"),))).train()
    assert not any(module.training for module in student.model.modules())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "olmo2"])
def test_gradient_checkpointing_changes_no_gradient(name, tokens):
    gradients = []
    for checkpointed in (False, True):
        student = scramble(elasticize(make_tiny(name), MIXED), 0.1)
        if checkpointed:
            student.checkpoint_blocks()
        student.train()
        out, decisions = student(tokens)
        compute = student.compute.ratio(decisions, torch.ones_like(tokens, dtype=torch.bool), "decode")
        (out.logits.float().logsumexp(-1).mean() + compute).backward()
        gradients.append({n: p.grad for n, p in student.added_parameters().items()})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][parameter], msg=parameter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_was_added_stays_float32_where_a_model_is_converted(dtype, llama, tokens):
    student = scramble(elasticize(llama, MIXED)).to(dtype)
    assert {x.dtype for x in student.added_tensors().values() if x.is_floating_point()} == {torch.float32}
    with torch.no_grad():
        assert student(tokens)[0].logits.isfinite().all()
        assert student.generate(tokens[:1], max_new_tokens=3, pad_token_id=0).shape[1] > 12


def test_copy_has_its_own_routers(llama, tokens):
    student = elasticize(llama, MIXED)
    other = copy.deepcopy(student)
    scramble(other)
    with student.teacher():
        assert not other.runtime.bypass
    assert torch.equal(student(tokens)[0].logits, llama(tokens, use_cache=False).logits)
    assert not torch.equal(student(tokens)[0].logits, other(tokens)[0].logits)


def test_a_saved_student_is_as_readable_as_any_new_file(llama, tmp_path):
    (tmp_path / "plain").touch()
    elasticize(llama, MIXED).save(tmp_path / "saved.safetensors")
    assert (tmp_path / "saved.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_students_model_says_how_it_is_saved(llama, tmp_path):
    with pytest.raises(ValueError, match=r"student\.save\(FILE\)"):
        elasticize(llama, MIXED).model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_of_earlier_versions_name_parameters_otherwise(tmp_path):
    former = {
        "routers.score.bend.0.weight": torch.zeros(2),
        "routers.merge.unlike": torch.ones(()),
        "unlikely": torch.ones(1),
    }
    write_tensors(tmp_path / "routers.safetensors", former, {})
    found = read_tensors(tmp_path / "routers.safetensors")[0]
    assert found.keys() == {"routers.score.mlp.0.weight", "routers.merge.distance_weight", "unlikely"}


def test_added_state_round_trip(llama, tokens):
    student = scramble(elasticize(llama, MIXED))
    other = elasticize(make_tiny("llama"), MIXED)
    other.load_added_state(student.added_state())
    assert torch.equal(student(tokens)[0].logits, other(tokens)[0].logits)
    assert not [n for n in student.added_state() if "base_layer.weight" in n]


def test_checkpoint_of_another_student_is_refused(llama, tmp_path):
    student, other = elasticize(llama, StudentSpec((RouterSpec("token"),))), elasticize(make_tiny("llama"), MIXED)
    other.runtime.offset = 3.0
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not fit this student"):
        student.restore(tmp_path / "other.safetensors")
    assert student.runtime.offset == 0.0


def test_the_dial_turns_top_k_shares_too(llama, tokens):
    student = elasticize(llama, StudentSpec((EVERY_KIND["head-topk"], EVERY_KIND["expert-topk"])))
    run, shares = student.runtime, []
    run.capacity = 0.5
    for run.offset in (-2.0, 0.0, 2.0):
        _, decisions = student(tokens)
        shares.append([share.mean().item() for share in decisions.share.values()])
    assert set(shares[1]) == {0.5} and all(low < 0.5 < high for low, high in zip(shares[0], shares[2], strict=True))
    run.capacity = 1.0
    assert run.kept == 1.0


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_offloaded_models_are_refused(offload: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    """Offloaded weights are on the device only while a layer's own forward runs; students read them outside of it."""
    where = () if offload == "cpu_offload" else (tmp_path,)
    getattr(accelerate, offload)(llama, *where, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="device_map"):
        elasticize(llama, MIXED)


def test_unsupported_architecture_says_what_was_looked_for():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"bloom.*llama"):
        elasticize(model, MIXED)


@pytest.mark.parametrize(("make", "name"), [(make_tiny, "llama"), (image.make_tiny, "timm_fused")])
@pytest.mark.parametrize("part", [nn.Linear(2, 3), nn.Sequential(nn.Conv1d(1, 1, 1)), nn.Parameter(torch.ones(2, 2))])
def test_parts_that_a_record_does_not_name_are_refused(make: Callable[[str], nn.Module], name: str, part: Any) -> None:
    model = make(name)
    last: Any = architecture_of(model)[1][-1]
    last.gain = nn.Parameter(torch.ones(2))
    architecture_of(model)
    last.adapter = part
    with pytest.raises(ValueError, match=r"(Block|Layer) 2 of .*\(\w+\) .* in adapter: .*only (self_)?attn, mlp can"):
        elasticize(model, StudentSpec((RouterSpec("head"),)))


def test_models_that_torch_makes_unusable_are_refused(llama: PreTrainedModel) -> None:
    spec = StudentSpec((RouterSpec("channel"),))
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match=r"default type is torch\.float64, and routers are in torch\.float32"):
            elasticize(llama, spec)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"made within torch\.inference_mode"):
        elasticize(make_tiny("llama"), spec)


def test_attention_to_tokens_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GPT2Block 0 of this model \(gpt2\) .* in crossattention: .*only attn, mlp"):
        elasticize(make_tiny("gpt2", add_cross_attention=True), MIXED)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (dict(kind="token", sites=("attn_in",)), "no site"),
        (dict(kind="head", sites=("attn",)), "leave `sites`"),
        (dict(kind="head", substitute=4), "no effect"),
        (dict(kind="token", selection="topk", granularity="sequence"), "granularity"),
        (dict(kind="token", hidden=8), "without `network: mlp`"),
        (dict(kind="head", network="static", granularity="sequence"), "once for all"),
        (dict(kind="token", network="static", selection="topk"), "once for all"),
        (dict(kind="channel", network="mlp"), "one limit for each channel"),
    ],
)
def test_router_settings_without_effect_are_errors(settings, problem):
    with pytest.raises(ValueError, match=problem):
        RouterSpec(**settings)


def test_each_branch_has_the_substitute_of_its_own_router(llama: PreTrainedModel) -> None:
    routers = (RouterSpec("token", ("attn",), substitute=4), RouterSpec("token", ("mlp",), substitute=6))
    block = elasticize(llama, StudentSpec(routers)).blocks[0]
    assert len(block.self_attn.substitutes["token"].down) == 4
    assert len(block.mlp.substitutes["token"].down) == 6
