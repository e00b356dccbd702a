"""Mask execution, skipping and decoding from a cache give the same logits for every kind of router, and skipping does
not compute what gates close."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

from students import LoraSpec, RouterSpec, Student, StudentSpec, elasticize
from students.architectures.language import LANGUAGE_MODELS
from students.execution import linear_group
from students.flops import flop_counter
from students.kernels import devices
from students.libraries import cache_of
from tests.pico.language import MORE, TINY, make_tiny
from tests.students.test_students import EVERY_KIND, MIXED, scramble

pytestmark = pytest.mark.usefixtures("no_gradients")

KINDS = {
    **EVERY_KIND,
    "token-weighted": RouterSpec("token", weight="score", substitute=2),
    "token-drop-all": RouterSpec("token", kv="drop", substitute=4),
    "token-prefix": RouterSpec("token", prefix=3, substitute=4),
    "layer-prefix-drop": RouterSpec("layer", prefix=3, kv="drop"),
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
SPECS["mixed-neuron"] = StudentSpec(
    (
        RouterSpec("token", substitute=3),
        RouterSpec("layer", kv="drop", blocks="odd"),
        RouterSpec("channel", sites=("attn_in", "attn_out")),
        RouterSpec("neuron"),
    ),
    LoraSpec(2),
)
GATED = [
    name
    for name, (config, _) in {**TINY, **MORE}.items()
    if len(LANGUAGE_MODELS[getattr(transformers, config).model_type].mlp_in) == 2
]
"""Models whose MLP is gated (a gate beside the up projection)."""
COUNTED = ["llama", "gemma2", "phi3", "gpt2", "olmo2"]
"""Models of which no two have the same kinds of parts: they are tested with every kind of router, and their FLOPs are
counted."""
COMBINED = ["mixed", "mixed-keep", "mixed-channels", "mixed-neuron", "expert-static", "head-static", "token-drop-all"]
"""Specifications that between them route every part of a model in every way: all models are tested with them."""
MATRIX = [(name, kind) for name in sorted(TINY) for kind in sorted(SPECS) if name in COUNTED or kind in COMBINED]
PLACES = {case: sorted(TINY).index(case[0]) + sorted(SPECS).index(case[1]) for case in MATRIX}
EVEN, ODD = ([case for case in MATRIX if case[0] == "llama" or PLACES[case] % 2 == odd] for odd in (0, 1))
"""Halves of the matrix like the two colours of a chessboard: of tests of which one says nearly what the other says, one
takes EVEN and one takes ODD. Either has every model and every kind; Llama, with every kind, is in both."""
CLOSE = dict(atol=1e-3, rtol=2e-3)


def make(name: str, spec: StudentSpec, **overrides: object) -> Student:
    """Return a tiny student with random routers at capacity 0.5; skip the test if the model refuses neuron routers."""
    if spec.find("neuron") and name not in GATED:
        with pytest.raises(ValueError, match="gate"):
            elasticize(make_tiny(name), spec)
        pytest.skip("no gate of its own")
    student = scramble(elasticize(make_tiny(name, **overrides), spec)).train(False)
    student.runtime.capacity = 0.5
    return student


def in_both_ways(student: Student, *args: object, **kwargs: object) -> list[torch.Tensor]:
    """Return the logits of mask execution and of skipping."""
    results = []
    for way in ("mask", "skip"):
        student.runtime.execution = way
        results.append(student(*args, **kwargs)[0].logits)
    return results


def assert_mask_is_skip(student: Student, tokens: torch.Tensor, padding: torch.Tensor, **kwargs: object) -> None:
    """Assert that both ways give the same logits for all tokens but padding."""
    masked, skipped = (logits[padding.bool()] for logits in in_both_ways(student, tokens, padding, **kwargs))
    torch.testing.assert_close(masked, skipped, **CLOSE)


@pytest.mark.parametrize(("name", "kind"), EVEN)
def test_mask_is_skip(name: str, kind: str, tokens: torch.Tensor, padding: torch.Tensor):
    student = make(name, SPECS[kind])
    for batch in (tokens, tokens[:1], tokens[:1, :1]):
        torch.testing.assert_close(*in_both_ways(student, batch), **CLOSE)
    assert_mask_is_skip(student, tokens, padding)


def decode(student: Student, tokens: torch.Tensor, mask: torch.Tensor | None, prompt: int) -> torch.Tensor:
    """Return the logits of all tokens from a prefill of `prompt` tokens and cached decode steps of one token each."""
    logits, cache = [], None
    for a, b in itertools.pairwise([0, *range(prompt, tokens.shape[1] + 1)]):
        upto = None if mask is None else mask[:, :b]
        positions = None if mask is None else (upto.cumsum(1) - 1).clamp(min=0)[:, a:]
        out, _ = student(tokens[:, a:b], upto, use_cache=True, past_key_values=cache, position_ids=positions)
        cache = cache_of(out)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def assert_decodes_in_one_pass(student: Student, tokens: torch.Tensor) -> None:
    """Assert that one masked pass over whole rows gives the logits of skipping decode steps after a prompt of five."""
    prompt = torch.zeros_like(tokens, dtype=torch.bool)
    prompt[:, :5] = True
    student.runtime.execution = "mask"
    whole = student(tokens, prompt=prompt)[0].logits
    student.runtime.execution = "skip"
    for rows in (slice(0, 2), slice(0, 1)):
        torch.testing.assert_close(whole[rows], decode(student, tokens[rows], None, 5), **CLOSE)


def assert_one_however_it_runs(
    student: Student, tokens: torch.Tensor, padding: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assert that masks, skipping, skipping as on a GPU and cached decoding give the same logits, with padding, which
    fills the first four places of the first row, and without."""
    valid = padding.bool()
    torch.testing.assert_close(*in_both_ways(student, tokens), **CLOSE)
    assert_decodes_in_one_pass(student, tokens)
    assert_mask_is_skip(student, tokens, padding)
    skipped = student(tokens, padding)[0].logits
    with monkeypatch.context() as patch:
        patch.setattr(devices, "runs_ahead", lambda device: True)
        torch.testing.assert_close(skipped[valid], student(tokens, padding)[0].logits[valid], **CLOSE)
    alone, padded = decode(student, tokens[:1, 4:], None, 5), decode(student, tokens, padding, 9)
    torch.testing.assert_close(alone[0], padded[0, 4:], **CLOSE)


@pytest.mark.parametrize(
    ("operators", "name", "kind"),
    [*(("c", *case) for case in ODD), *(("reference", *case) for case in ODD if "llama" in case)],
    indirect=["operators"],
)
def test_cached_decoding_is_one_forward_pass(name: str, kind: str, tokens: torch.Tensor, operators: None):
    assert_decodes_in_one_pass(make(name, SPECS[kind]), tokens)


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_padding_and_batch_mates_change_nothing_while_decoding(kind: str, tokens: torch.Tensor):
    student = make("llama", SPECS[kind])
    alone = decode(student, tokens[:1, :9], None, 5)
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    padded[0, :3], padded[0, 3:], mask[0, :3] = 0, tokens[0, :9], 0
    batched = decode(student, padded, mask, 8)
    # positions of the padded prompt start at its first token
    torch.testing.assert_close(alone[0, 5:], batched[0, 8:], **CLOSE)


@pytest.mark.parametrize("name", sorted(TINY))
def test_one_product_is_as_good_as_several(name: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    """Layers that read the same channels give the same logits joined in one product and apart."""
    student = make(name, SPECS["channel"])
    together = student(tokens)[0].logits
    monkeypatch.setattr(linear_group, "JOINT_ROWS", 0)
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


def test_rows_with_budgets_of_their_own_may_all_be_closed(tokens: torch.Tensor, operators: None):
    student = make("llama", StudentSpec((RouterSpec("layer"), RouterSpec("channel"))))
    student.runtime.offset = (-30.0, -40.0)
    torch.testing.assert_close(*in_both_ways(student, tokens), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_hidden_states_are_of_all_tokens(name: str, tokens: torch.Tensor):
    model = make_tiny(name)
    model(tokens, output_hidden_states=True)  # installs transformers' hooks before a student's
    student = scramble(elasticize(model, StudentSpec((RouterSpec("layer", kv="drop"),)))).train(False)
    skipped = student(tokens, output_hidden_states=True)[0].hidden_states
    student.runtime.execution = "mask"
    torch.testing.assert_close(skipped, student(tokens, output_hidden_states=True)[0].hidden_states, **CLOSE)


def spent(student: Student, **inputs: object) -> tuple[int, object]:
    """Return the FLOPs that torch counts in a forward pass, and the routers' decisions in the pass."""
    with flop_counter() as counter:
        _, decisions = student(**inputs)
    return counter.get_total_flops(), decisions


def eager(name: str, spec: StudentSpec) -> Student:
    """Return a student with eager attention, whose FLOPs torch can count on a CPU."""
    return make(name, spec, attn_implementation="eager", vocab_size=120)


@pytest.mark.parametrize(
    ("name", "kind"), [case for case in MATRIX if "llama" in case or (case[0] in COUNTED and case[1] in COMBINED)]
)
def test_reported_compute_is_what_torch_counts(name: str, kind: str, tokens: torch.Tensor):
    assert_counted(eager(name, SPECS[kind]), tokens[:1])


def assert_counted(student: Student, row: torch.Tensor) -> None:
    """Assert that reported compute of row [1, T] is what torch counts, in prefill and when decoding its last token."""
    student(row)  # makes what is made once, such as the head's preview
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
