"""Hybrid models: what stands in place of attention runs whole, and all else is routed as in any language model."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from elastic.accounting.counters import count
from students import LoraSpec, RouterSpec, StudentSpec, elasticize
from students.architectures.lookup import record_in
from students.calibration.language import calibrate
from students.execution.kv_cache import cache_bytes
from students.families.language import LanguageStudent
from students.libraries import cache_of
from students.recording import decoding
from students.recording.decoding import Decoding
from tests.pico.language import make_tiny
from tests.students.tape import Tape
from tests.students.test_decoding import SIX
from tests.students.test_execution import CLOSE, assert_one_however_it_runs, decode, in_both_ways
from tests.students.test_students import MIXED, open_student_of, scramble

HEAD = RouterSpec("vocab", rank=5)
SPECS = {
    "default": StudentSpec((RouterSpec("channel"), HEAD), LoraSpec(2)),
    "mixed": MIXED,
    "neuron": StudentSpec(
        (RouterSpec("token", substitute=3), RouterSpec("layer", kv="drop"), RouterSpec("head"), RouterSpec("neuron"))
    ),
    "expert": StudentSpec((RouterSpec("token", sites=("mlp",), prefix=3), RouterSpec("expert", groups=5)), gains=True),
    "static": StudentSpec((RouterSpec("channel", network="static"), RouterSpec("head", network="static"))),
    "mixture": StudentSpec((RouterSpec("token", kv="drop"), RouterSpec("head"), RouterSpec("mixture"), HEAD)),
}
DENSE = [kind for kind in SPECS if kind != "mixture"]
RUN = [
    *(("qwen3_5", kind) for kind in DENSE),
    *((name, kind) for name in ("olmo_hybrid", "lfm2", "granite4") for kind in ("default", "mixed")),
    *((name, "mixture") for name in ("qwen3_next", "qwen3_5_moe", "lfm2_moe", "granite4_moe")),
    *(("granite4_moe", kind) for kind in ("mixed", "expert")),
]
MAMBA = ("granite4", "granite4_moe", "bamba")
ALL = torch.ones(1, 12, dtype=torch.bool)


def make(name: str, kind: str = "default", **settings: object) -> LanguageStudent:
    """Return a tiny student with random routers."""
    student = scramble(elasticize(make_tiny(name, **settings), SPECS[kind])).train(False)
    assert isinstance(student, LanguageStudent)
    return student


def mixers(student: LanguageStudent) -> list[torch.nn.Module]:
    """Return what stands in place of attention."""
    records = [(block, record_in(student.record, block)) for block in student.blocks]
    return [block.get_submodule(record.attn) for block, record in records if not record.attn_in]


def assert_texts_of_recorded_steps(
    student: LanguageStudent, tokens: Tensor, padding: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of recorded steps, whose cache grows twice, are the model's, and so is one that is read a second time."""
    monkeypatch.setattr(decoding, "SMALLEST", 16)
    monkeypatch.setattr(decoding, "AT_ONCE", 16)
    options = dict(SIX, max_new_tokens=14, min_new_tokens=14)
    prompts = [dict(input_ids=tokens * padding, attention_mask=padding), dict(input_ids=tokens[1:])]
    plain = [student.model.generate(**prompt, **options) for prompt in prompts]
    for recorder in (Tape, None):  # None: as CPUs do
        student._decoding.recorder = recorder
        with warnings.catch_warnings(action="error"):
            texts = [student.generate(**prompt, **options) for prompt in (*prompts, prompts[0])]
        assert all(map(torch.equal, texts, [*plain, plain[0]]))
        assert {key[1] for key in student._decoding._steps} == {16, 24, 32}


@pytest.mark.parametrize("name", ["qwen3_5", "olmo_hybrid", "lfm2", "granite4", "granite4_moe", "bamba"])
def test_open_gates_change_no_bit(name: str, tokens: Tensor, padding: Tensor) -> None:
    open_student_of(make_tiny(name), tokens, padding)


@pytest.mark.parametrize(("name", "kind"), RUN)
@torch.no_grad()
def test_mask_is_skip_is_cached_decoding(
    name: str, kind: str, tokens: Tensor, padding: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_one_however_it_runs(make(name, kind), tokens, padding, monkeypatch)


@pytest.mark.parametrize("kind", ["default", "mixed"])
@torch.no_grad()
def test_bamba_is_one_however_it_runs(kind: str, tokens: Tensor, padding: Tensor) -> None:
    """As above, with positions: without them transformers' Bamba decodes every token as if it were the first."""
    student, prompt = make("bamba", kind), torch.arange(12).expand(2, 12) < 9
    for mask in (padding, torch.ones_like(padding)):
        masked, skipped = in_both_ways(student, tokens, mask, prompt=prompt & mask.bool())
        for logits in (skipped, decode(student, tokens, mask, 9)):
            torch.testing.assert_close(masked[mask.bool()], logits[mask.bool()], **CLOSE)


@torch.no_grad()
def test_only_the_mlp_is_routed_where_there_is_no_attention(tokens: Tensor) -> None:
    student = make("qwen3_5", "mixed")
    _, decisions = student(tokens)
    of_blocks = [{key[2:] for key in decisions.share if key.startswith(f"{number}.")} for number in range(3)]
    assert of_blocks[0] == of_blocks[2] == {"mlp.token", "mlp.expert", "mlp_in.channel", "mlp_out.channel"}
    assert of_blocks[1] > of_blocks[0] and {"layer", "attn.head", "attn.token"} < of_blocks[1]
    assert student.compute.blocks[1].q == 32 * 2 * 4 * 16  # a query and a gate for each head
    with pytest.raises(ValueError, match=r"only some have attention.*layer.*even"):
        elasticize(make_tiny("qwen3_5"), StudentSpec((RouterSpec("layer", blocks="even"),)))


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "qwen3_next", "granite4", "granite4_moe", "bamba"])
@torch.no_grad()
def test_decoding_costs_what_is_counted_and_the_state(name: str, tokens: Tensor) -> None:
    """torch counts no product with the state, but Mamba 2's last, and the convolution of one token in two places."""
    student, row = make(name, attn_implementation="eager"), tokens[:1]
    _, decisions = student(row)
    cache = cache_of(student(row[:, :-1], use_cache=True)[0])
    last = dict(use_cache=True, past_key_values=cache, position_ids=torch.tensor([[11]]))
    flops, _ = count(lambda: student(row[:, -1:], **last))
    head = student.compute.routed_head(decisions.share["vocab"], "decode")
    macs = float((student.compute.routed_blocks(decisions, ALL, "decode") + head)[0, -1])
    kernels = [module.weight.numel() for m in mixers(student) for module in m.modules() if hasattr(module, "groups")]
    state, left_out = (4 * 16 * 6, 1) if name in MAMBA else (0, 0) if name == "lfm2" else (4 * 8 * 6, 3)
    assert flops == pytest.approx(2 * (macs + sum(kernels) - len(kernels) * left_out * state), rel=0.002)
    states = 4 * len(kernels) * (sum(kernels) / len(kernels) + state)
    assert cache_bytes(cache) == states + 4 * 2 * 2 * student.compute.blocks[1].per_key / 8 * 12


@pytest.mark.parametrize("operators", ["c"], indirect=True)
@pytest.mark.parametrize(
    "name",
    [
        "qwen3_5",
        "lfm2",
        "granite4_moe",
        *(pytest.param(n, marks=pytest.mark.thorough) for n in ("olmo_hybrid", "bamba")),
    ],
)
@torch.no_grad()
def test_decoding_is_recorded(
    name: str, tokens: Tensor, padding: Tensor, monkeypatch: pytest.MonkeyPatch, operators: None
) -> None:
    """A step keeps its own states, goes on with them where a cache grows, and begins anew with every text."""
    student = make(name)
    assert_texts_of_recorded_steps(student, tokens, padding, monkeypatch)
    prompt = dict(input_ids=tokens * padding, attention_mask=padding)
    frozen = Decoding(student.model, student.trunk, recorder=Tape)
    with student.teacher():
        assert torch.equal(frozen.generate(**prompt, **SIX), student.model.generate(**prompt, **SIX))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
@torch.no_grad()
def test_cuda_graphs_decode_what_the_model_does(name: str, tokens: Tensor, padding: Tensor) -> None:
    student = make(name).to("cuda")
    inputs = dict(input_ids=(tokens * padding).cuda(), attention_mask=padding.cuda())
    plain = student.model.generate(**inputs, **SIX)
    with warnings.catch_warnings(action="error"):
        assert torch.equal(student.generate(**inputs, **SIX), plain)
    assert student._decoding._steps


@torch.no_grad()
def test_what_a_state_does_not_allow(tokens: Tensor) -> None:
    student = make("qwen3_5")
    student._decoding.recorder = Tape
    with pytest.warns(UserWarning, match="without recorded steps: the state of a cache that is returned"):
        student.generate(tokens, **SIX, return_dict_in_generate=True)
    with pytest.raises(ValueError, match=r"lossless decoding is not possible: .* a state, which cannot be taken back"):
        student.generate(tokens[:1], lossless=True, **SIX)


def test_calibration_meets_the_target(tokens: Tensor) -> None:
    student = elasticize(make_tiny("qwen3_5"), StudentSpec((RouterSpec("channel"), RouterSpec("layer"), HEAD)))
    start = calibrate(student, tokens.split(1), 0.8, "decode")
    assert start.compute == pytest.approx(0.8, abs=0.02)
    assert all(parameter.isfinite().all() for parameter in student.added_parameters().values())


def test_routers_in_front_of_a_state_learn(tokens: Tensor) -> None:
    student = make("qwen3_5", "mixed").train()
    out, decisions = student(tokens)
    loss = out.logits.logsumexp(-1).mean() + student.compute.ratio(decisions, ALL.expand(2, 12), "decode")
    loss.backward()
    first = [p.grad for name, p in student.added_parameters().items() if ".layers.0." in name]
    assert first and all(grad is not None and grad.isfinite().all() and grad.any() for grad in first)
