"""What is closed is not computed, and nothing else changes: mask == skip == cached decoding, for every kind."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from students import LoraSpec, RouterSpec, Student, StudentSpec, elasticize
from students.execution import linear
from students.kernels import fused, ops
from students.libraries import cache_of
from tests.pico.language import TINY, make_tiny
from tests.students.test_students import EVERY_KIND, MIXED, scramble

KINDS = {
    **EVERY_KIND,
    "token-weighted": RouterSpec("token", weight="score", substitute=2),
    "token-drop-all": RouterSpec("token", kv="drop", substitute=4),
    "token-static": RouterSpec("token", network="static", blocks="odd"),
    "layer-sequence": RouterSpec("layer", granularity="sequence", kv="drop"),
    "head-sequence": RouterSpec("head", granularity="sequence"),
    "head-static": RouterSpec("head", network="static"),
    "expert-sequence": RouterSpec("expert", granularity="sequence", groups=6, weight="score"),
    "expert-static": RouterSpec("expert", network="static", groups=48),
}
SPECS = {name: StudentSpec((router,), LoraSpec(2)) for name, router in KINDS.items()}
SPECS["mixed"] = MIXED
SPECS["mixed-keep"] = StudentSpec(
    (
        RouterSpec("token", substitute=3),
        RouterSpec("head"),
        RouterSpec("expert", groups=5),
        RouterSpec("layer", kv="drop"),
    )
)
SPECS["mixed-channels"] = StudentSpec((RouterSpec("token"), RouterSpec("channel"), RouterSpec("vocab", rank=5)))
CLOSE = dict(atol=1e-3, rtol=2e-3)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def make(name: str, spec: StudentSpec, **overrides: object) -> Student:
    student = scramble(elasticize(make_tiny(name, **overrides), spec)).train(False)
    student.runtime.capacity = 0.5
    return student


def in_both_ways(student: Student, *args: object, **kwargs: object) -> list[torch.Tensor]:
    """Logits by masks and by skipping."""
    results = []
    for way in ("mask", "skip"):
        student.runtime.execution = way
        results.append(student(*args, **kwargs)[0].logits)
    return results


@pytest.mark.parametrize("kind", sorted(SPECS))
@pytest.mark.parametrize("name", sorted(TINY))
def test_mask_is_skip(name: str, kind: str, tokens: torch.Tensor):
    student = make(name, SPECS[kind])
    for batch in (tokens, tokens[:1], tokens[:1, :1]):
        masked, skipped = in_both_ways(student, batch)
        torch.testing.assert_close(masked, skipped, **CLOSE)
    padding = torch.ones_like(tokens)
    padding[0, :4] = 0
    masked, skipped = in_both_ways(student, tokens, padding)
    torch.testing.assert_close(masked[padding.bool()], skipped[padding.bool()], **CLOSE)


def decode(student: Student, tokens: torch.Tensor, mask: torch.Tensor | None, prompt: int) -> torch.Tensor:
    """Logits of all tokens from one pass over the prompt and then one token at a time, from a cache."""
    logits, cache = [], None
    for a, b in itertools.pairwise([0, *range(prompt, tokens.shape[1] + 1)]):
        upto = None if mask is None else mask[:, :b]
        positions = None if mask is None else (upto.cumsum(1) - 1).clamp(min=0)[:, a:]
        out, _ = student(tokens[:, a:b], upto, use_cache=True, past_key_values=cache, position_ids=positions)
        cache = cache_of(out)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("kind", sorted(SPECS))
@pytest.mark.parametrize("name", sorted(TINY))
def test_cached_decoding_is_one_forward_pass(name: str, kind: str, tokens: torch.Tensor, operators: None):
    student = make(name, SPECS[kind])
    prompt = torch.zeros_like(tokens, dtype=torch.bool)
    prompt[:, :5] = True
    student.runtime.execution = "mask"
    whole = student(tokens, prompt=prompt)[0].logits
    student.runtime.execution = "skip"
    for rows in (slice(0, 2), slice(0, 1)):
        torch.testing.assert_close(whole[rows], decode(student, tokens[rows], None, 5), **CLOSE)


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_padding_and_batch_mates_change_nothing_while_decoding(kind: str, tokens: torch.Tensor):
    student = make("llama", SPECS[kind])
    alone = decode(student, tokens[:1, :9], None, 5)
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    padded[0, :3], padded[0, 3:], mask[0, :3] = 0, tokens[0, :9], 0
    batched = decode(student, padded, mask, 8)
    # the padded prompt's own positions start at its first token
    torch.testing.assert_close(alone[0, 5:], batched[0, 8:], **CLOSE)


@pytest.mark.parametrize("name", sorted(TINY))
def test_one_product_is_as_good_as_several(name: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    student = make(name, SPECS["channel"])
    together = student(tokens)[0].logits
    monkeypatch.setattr(linear, "JOINT_ROWS", 0)
    torch.testing.assert_close(student(tokens)[0].logits, together, **CLOSE)


@pytest.mark.parametrize("name", sorted(TINY))
def test_norms_run_on_what_a_layer_router_lets_through_alone(name: str, tokens: torch.Tensor):
    student, seen = make(name, SPECS["layer-drop"]), []
    block = student.blocks[1]
    exit_ = student.record.mlp_exit or f"{student.record.mlp}.base_layer"
    block.get_submodule(exit_).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    _, decisions = student(tokens)
    assert seen == [int(decisions.share["1.layer"].sum())] and 0 < seen[0] < tokens.numel()
    with student.teacher():
        student(tokens)
    assert seen[1:] == [tokens.numel()]


def spent(student: Student, **inputs: object) -> tuple[int, object]:
    """(FLOPs that torch counts in a forward pass, what it decided)."""
    with FlopCounterMode(display=False) as counter:
        _, decisions = student(**inputs)
    return counter.get_total_flops(), decisions


def eager(name: str, spec: StudentSpec) -> Student:
    """A student whose attention torch can count on a CPU."""
    return make(name, spec, attn_implementation="eager", vocab_size=120)


@pytest.mark.parametrize("kind", sorted(SPECS))
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "olmo2"])
def test_reported_compute_is_what_torch_counts(name: str, kind: str, tokens: torch.Tensor, operators: None):
    student = eager(name, SPECS[kind])
    row = tokens[:1]
    student(row)  # what is made once (the preview of the head) is made
    valid = torch.ones_like(row, dtype=torch.bool)

    def reported(decisions: object, phase: str) -> torch.Tensor:
        head = student.compute.routed_head(decisions.share.get("vocab"), phase)
        return 2 * (student.compute.routed_blocks(decisions, valid, phase) + head * valid)

    flops, decisions = spent(student, input_ids=row)
    assert flops == pytest.approx(float(reported(decisions, "prefill").sum()), rel=0.01), "prefill"

    prompt = valid.clone()
    prompt[:, -1] = False
    _, decisions = student(row, prompt=prompt)
    out, _ = student(row[:, :-1], use_cache=True)
    flops, _ = spent(student, input_ids=row[:, -1:], use_cache=True, past_key_values=cache_of(out))
    assert flops == pytest.approx(float(reported(decisions, "decode")[0, -1]), rel=0.01), "decode"


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_masked_products(rows: int, dtype: torch.dtype, operators: None):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 77).to(dtype), torch.randn(77, 160).to(dtype)
    limit, bias = torch.rand(77).to(dtype).float(), torch.randn(160).to(dtype)
    down, up, ends = torch.randn(6, 77).to(dtype), torch.randn(3, 160).to(dtype), [64, 160]
    masked, _ = fused.channel_gate(x, limit)
    assert torch.equal(masked, torch.where(x.abs() >= limit, x, 0))
    assert torch.equal(fused.masker(limit, dtype)(x.T.contiguous().T), masked)
    low = x.float() @ down.float().T
    corrections = torch.cat([low[:, :3] @ up.float()[:, :64], low[:, 3:] @ up.float()[:, 64:]], 1)
    expected = masked.float() @ weight.float() + bias.float() + corrections
    close = dict(atol=1e-4, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.3, rtol=0.02)
    if rows == 1:
        out, count = ops.read_channels(x[0], limit, weight, bias, down, up, ends)
        torch.testing.assert_close(out[None].float(), expected, **close)
        torch.testing.assert_close(
            ops.dot_rows(x[0], weight.T.contiguous(), bias, None).float(),
            (x.float() @ weight.float() + bias.float())[0],
            **close,
        )
    elif ops.reads_few(weight, ends):
        out, count = ops.few_channels(x, limit, weight, bias, down, up, ends)
        torch.testing.assert_close(out.float(), expected, **close)
    else:
        return
    assert int(count) == int((masked != 0).any(0).sum())


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_rows_where_the_preview_asks_for_them(rows: int, dtype: torch.dtype, operators: None):
    torch.manual_seed(rows)
    x, head, preview = (torch.randn(*size).to(dtype) for size in ((rows, 64), (200, 64), (rows, 200)))
    limit, tail, bias = (
        torch.linspace(-0.5, 1.5, rows).to(dtype),
        torch.tensor(0.5).to(dtype),
        torch.randn(200).to(dtype),
    )
    logits, count = ops.exact_rows(x, head, bias, preview, limit, tail)
    needed = preview >= limit[:, None]
    expected = torch.where(needed, x.float() @ head.float().T + bias.float(), preview.float() + 0.5)
    torch.testing.assert_close(logits.float(), expected, atol=1e-4 if dtype == torch.float32 else 0.2, rtol=0.02)
    assert torch.equal(count, needed.sum(1))
