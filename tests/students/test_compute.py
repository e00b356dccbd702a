"""Reported compute is compute that is done: the formulas agree with torch's counter and with counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from students import LoraSpec, RouterSpec, Student, StudentSpec, elasticize
from students.calibration.fit import fit_vocab
from students.compute import PHASES, BlockShape, ComputeModel
from students.decisions import Decisions
from tests.pico.language import make_tiny
from tests.students.test_students import EVERY_KIND, MIXED, scramble

ALL = torch.ones(2, 12, dtype=torch.bool)


def count(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return the multiply-accumulates of a forward pass: half of the FLOPs that torch counts, with eager attention,
    because torch's counter does not know the fused attention of CPUs."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False)
    return counter.get_total_flops() / 2


def student_of(*routers: RouterSpec, name: str = "llama", lora: int = 0) -> Student:
    return elasticize(make_tiny(name), StudentSpec(routers, LoraSpec(lora)))


def test_dense_prefill_is_what_torch_counts(any_model: PreTrainedModel, tokens: torch.Tensor):
    counted = count(any_model, tokens)
    student = elasticize(any_model, StudentSpec((RouterSpec("token"),)))
    assert float(student.compute.dense(ALL, "prefill").sum()) == pytest.approx(counted, rel=0.01)


def test_added_parts_are_counted(any_model: PreTrainedModel, tokens: torch.Tensor):
    """With every gate open, mask execution computes the model and all added parts, and the ratio counts both."""
    spec = StudentSpec(
        (RouterSpec("token", network="mlp", hidden=5), RouterSpec("head"), RouterSpec("expert", groups=6)), LoraSpec(3)
    )
    dense = count(any_model, tokens)
    student = elasticize(any_model, spec)
    with torch.no_grad():
        _, decisions = student(tokens, use_cache=False)
    whole = student.compute.dense(ALL, "prefill").sum()
    added = float((student.compute.ratio(decisions, ALL, "prefill") - 1) * whole)
    assert added == pytest.approx(count(student.model, tokens) - dense, rel=0.02)


def test_decode_counts_the_keys_so_far():
    """Token t attends to t + 1 keys, and with a sliding window to no more keys than the window holds."""
    for name, window in {"llama": 12, "mistral": 6}.items():
        compute = student_of(RouterSpec("token"), name=name).compute
        cost = compute.dense(ALL, "decode")[0]
        per_key = compute.blocks[0].per_key * len(compute.blocks)
        assert cost.diff().tolist() == [per_key if t < window else 0 for t in range(1, 12)]


def test_padding_costs_nothing_and_attracts_no_attention():
    compute = scramble(student_of(*MIXED.routers)).compute
    padded = torch.zeros(1, 12, dtype=torch.bool)
    padded[:, 4:] = True
    for phase in PHASES:
        cost = compute.dense(padded, phase)
        assert not cost[:, :4].any()
        torch.testing.assert_close(cost[:, 4:], compute.dense(padded[:, 4:], phase))


def test_padding_changes_no_ratio(llama: PreTrainedModel, tokens: torch.Tensor):
    student = scramble(elasticize(llama, StudentSpec(tuple(r for r in MIXED.routers if r.kind != "vocab"))))
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    _, alone = student(tokens[:1, 4:], use_cache=False)
    _, padded = student(tokens[:1], mask, position_ids=positions, use_cache=False)
    for phase in PHASES:
        whole = student.compute.ratio(padded, mask.bool(), phase)
        torch.testing.assert_close(whole, student.compute.ratio(alone, ALL[:1, 4:], phase))


@pytest.mark.parametrize("kind", sorted(EVERY_KIND))
@pytest.mark.parametrize("phase", PHASES)
def test_fewer_open_gates_never_cost_more(kind: str, phase: str):
    spec = EVERY_KIND[kind]
    compute = student_of(spec).compute
    costs = [compute.uniform(share / 10, 12, phase) for share in range(11)]
    assert costs == sorted(costs)
    saving = costs[-1] - costs[0]
    assert saving > 0.01 if spec.of_kind.saves(spec, phase) else saving == 0


@pytest.mark.parametrize("kind", [*sorted(EVERY_KIND), "mixed"])
@pytest.mark.parametrize("phase", PHASES)
def test_branches_add_up_to_the_blocks(kind: str, phase: str, llama: PreTrainedModel, tokens: torch.Tensor):
    spec = MIXED if kind == "mixed" else StudentSpec((EVERY_KIND[kind],), LoraSpec(2))
    student = scramble(elasticize(llama, spec))
    with torch.no_grad():
        _, decisions = student(tokens, use_cache=False)
        spent, dense = student.compute.by_branch(decisions, ALL, phase)
        assert spent.shape == dense.shape == (3, 2, 2, 12)
        torch.testing.assert_close(spent.sum((0, 1)), student.compute.routed_blocks(decisions, ALL, phase))
        torch.testing.assert_close(dense.sum((0, 1)), student.compute.dense(ALL, phase) - student.compute.head)
        with student.teacher():
            _, decisions = student(tokens, use_cache=False)
        assert torch.equal(student.compute.by_branch(decisions, ALL, phase)[0], dense)


def set_gates(student: Student, value: float) -> None:
    """Open (1e4) or close (-1e4) every threshold gate."""
    with torch.no_grad():
        for name, parameter in student.added_parameters().items():
            if name.endswith((".score", "linear.bias")):
                parameter.fill_(value)
            elif name.endswith((".log_limit", ".spread")):
                parameter.fill_(-value)


@pytest.mark.parametrize("kind", sorted(k for k, r in EVERY_KIND.items() if r.selection == "threshold"))
@pytest.mark.parametrize("phase", PHASES)
def test_uniform_is_what_open_and_closed_students_spend(kind: str, phase: str, tokens: torch.Tensor):
    student = student_of(EVERY_KIND[kind], lora=2)
    if kind == "vocab":  # an unfitted preview closes no row
        fit_vocab(student.model.get_output_embeddings(), torch.randn(40, 32))
    for share, value in ((1.0, 1e4), (0.0, -1e4)):
        set_gates(student, value)
        with torch.no_grad():
            _, decisions = student(tokens, use_cache=False)
        spent = float(student.compute.ratio(decisions, ALL, phase))
        assert spent == pytest.approx(student.compute.uniform(share, 12, phase)), share


def test_sequence_and_static_choices_save_in_prefill():
    for routers in (
        [RouterSpec("head", granularity="sequence")],
        [RouterSpec("expert", granularity="sequence")],
        [RouterSpec("head", network="static")],
        [RouterSpec("channel", network="static")],
    ):
        assert student_of(*routers).compute.uniform(0.5, 12, "prefill") < 0.9
    for site in ("attn_in", "attn_out", "mlp_in", "mlp_out"):
        router = RouterSpec("channel", network="static", sites=(site,))
        assert student_of(router).compute.uniform(0.5, 12, "prefill") < 0.99, site


SHAPE = dict(kv=20, o=100, mlp_in=300, mlp_out=150, per_key=8, window=None, own_q=True, narrows={})
SHAPE |= dict(lora={}, routers={}, substitutes={})


def test_decode_by_hand():
    """One block decodes three tokens with token, head and channel routers that drop closed keys; counted by hand."""
    spec = StudentSpec(
        (
            RouterSpec("token", kv="drop"),
            RouterSpec("head"),
            RouterSpec("channel", sites=("attn_in", "mlp_in", "mlp_out")),
        )
    )
    block = BlockShape(q=100, **{**SHAPE, "routers": {"attn.token": 4}, "substitutes": {"attn": 10}})
    compute = ComputeModel(spec, (block,), head=500, head_routed=0)
    share = {
        "0.attn.token": [1, 0, 1],  # the second token skips attention and writes no key
        "0.mlp.token": [1, 1, 0],  # the third token skips the MLP
        "0.attn.head": [0.5, 1, 0.25],
        "0.attn_in.channel": [0.5, 0.5, 1],
        "0.mlp_in.channel": [0.5, 1, 1],
        "0.mlp_out.channel": [0.2, 1, 1],
    }
    decisions = Decisions(share={key: torch.tensor([value]).float() for key, value in share.items()})
    valid = torch.ones(1, 3, dtype=torch.bool)
    # first token: q, one key and o for half the heads (q from half the channels, too), k and v, MLP, router
    first = 100 * 0.5 * 0.5 + 8 * 1 * 0.5 + 100 * 0.5 + 20 * 0.5 + 300 * 0.5 + 150 * 0.2 + 4
    second = 300 + 150 + 4 + 10  # MLP, router, and attention's substitute
    third = 100 * 0.25 + 8 * 2 * 0.25 + 100 * 0.25 + 20 + 4  # sees two keys, its own and the first token's
    torch.testing.assert_close(
        compute.routed_blocks(decisions, valid, "decode"), torch.tensor([[first, second, third]])
    )
    # dense: 670 for the block, 8 for each key, 500 for the head
    whole = 3 * (670 + 500) + 8 * (1 + 2 + 3)
    ratio = (first + second + third + 3 * 500) / whole
    torch.testing.assert_close(compute.ratio(decisions, valid, "decode"), torch.tensor(ratio))


def test_prefill_by_hand():
    """Prefill of three tokens: only token routers save, and each token attends to all keys that were written."""
    spec = StudentSpec((RouterSpec("token", kv="drop"), RouterSpec("head"), RouterSpec("channel")))
    compute = ComputeModel(spec, (BlockShape(q=100, **SHAPE),), head=500, head_routed=0)
    share = {key: torch.full((1, 3), 0.5) for key in ("0.attn.head", "0.attn_in.channel", "0.mlp_in.channel")}
    share["0.attn.token"] = torch.tensor([[1.0, 0.0, 1.0]])
    share["0.mlp.token"] = torch.tensor([[1.0, 1.0, 0.0]])
    cost = compute.routed_blocks(Decisions(share=share), torch.ones(1, 3, dtype=torch.bool), "prefill")
    attention = 100 + 8 * 2 + 100 + 20
    torch.testing.assert_close(cost, torch.tensor([[attention + 450.0, 450.0, attention]]))


def test_vocab_rows_by_hand():
    compute = ComputeModel(StudentSpec((RouterSpec("vocab"),)), (), head=500, head_routed=60)
    share = torch.tensor([0.1, 1.0])
    assert compute.routed_head(share, "decode").tolist() == pytest.approx([110, 560])
    assert torch.as_tensor(compute.routed_head(share, "prefill")).tolist() == 560  # all rows and the preview
    assert compute.routed_head(None, "decode") == compute.routed_head(None, "prefill") == 500


def test_compute_is_differentiable_in_every_router(llama: PreTrainedModel, tokens: torch.Tensor):
    student = scramble(elasticize(llama, MIXED), 0.1)
    _, decisions = student(tokens, use_cache=False)
    student.compute.ratio(decisions, ALL, "decode").backward()
    silent = [n for n, p in student.added_parameters().items() if ".routers." in n and p.grad is None]
    assert {name.split(".")[-1] for name in silent} <= {"tail"}
    assert any(p.grad is not None and p.grad.any() for p in student.added_parameters().values())
