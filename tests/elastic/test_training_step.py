"""A training step does not make the host wait for the device, and launches few operators besides matrix products."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from elastic import families
from elastic.config import BudgetConfig, LossConfig, RunConfig
from elastic.objectives.language import Distillation
from elastic.objectives.sums import routing_loss
from elastic.shape_config import plan_config
from students import RouterSpec, StudentSpec, elasticize
from students.decisions import Decisions
from students.kernels import devices, ops
from teachers.shapes import build, find_shape
from tests.pico.language import make_tiny
from tests.students.host_waits import Launches, NoHostWaits
from tests.students.tape import Tape
from tests.students.test_students import scramble

PRESETS = {
    "default": [],
    "default, prefill": ["budget.phase=prefill"],
    "default, a range": ["budget.target=0.6:0.9", "student.gains=true"],
    "mixture-of-depths": [],
    "router-tuning, a sequence": ["student.routers=[{kind: token, granularity: sequence}]", "data.prompt=8"],
}
MOST = 110
"""Largest number of operators launched for one block in a training step (forward pass of the teacher, forward and
backward pass of the student), with torch's norms and attention and fused rotary embeddings."""


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every device as one that the host runs ahead of, like a GPU."""
    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)


def configured(preset: str) -> RunConfig:
    return plan_config("llama3-8b", preset=preset.partition(",")[0], settings=PRESETS[preset])


def objective(preset: str, **sizes: int) -> Distillation:
    config = configured(preset)
    student = elasticize(make_tiny("llama", **sizes).requires_grad_(False), config.student)
    student.runtime.capacity = 0.5
    return Distillation(student, config.loss, config.budget, config.data).train()


def step(distillation: Distillation) -> None:
    ids = torch.randint(3, 100, (2, 32), generator=torch.Generator().manual_seed(0))
    distillation(ids, 1.0)[0].backward()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_host_waits_for_nothing(preset: str):
    distillation = objective(preset)
    step(distillation)
    with NoHostWaits():
        step(distillation)


@pytest.mark.parametrize("layers", [False, True])
def test_a_recorded_teacher_says_the_same(layers: bool) -> None:
    distillation = objective("default")
    distillation.loss = replace(distillation.loss, hidden_weight=float(layers), hidden_layers="all")
    distillation.layers = layers
    passes, made = distillation.student._teacher_passes, Tape.made
    texts = [torch.randint(3, 100, (2, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    losses = []
    for recorder in (None, Tape):
        for one in passes.values():
            one.recorder = recorder
        first = distillation.teacher_signals(texts[0])
        losses.append(torch.stack([distillation(ids, 1.0, s)[0] for ids, s in ((texts[0], first), *with_none(texts))]))
        assert Tape.made == made + (recorder is Tape) and len(passes[layers].kept) == (recorder is Tape)
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    distillation.eval()
    distillation.teacher_signals(texts[0][:1])
    assert Tape.made == made + 1, "only in training"


def with_none(texts: list[Tensor]) -> list[tuple[Tensor, None]]:
    return [(ids, None) for ids in texts]


def test_the_host_waits_for_no_image() -> None:
    config = plan_config("tiny-vit", settings=["train.batch=4", "data.held_out=4"])
    model = build(find_shape("tiny-vit"), torch.float32, "cpu")
    student, family = elasticize(model, config.student), families.of(config.family)
    batch = family.timing.training_batch(student, family.random_data(config, model), config)
    distillation = family.Distillation(student, config.loss, config.budget, config.data).train()
    for watch in (nullcontext(), NoHostWaits()):
        with watch:
            distillation(batch.sample, 1.0)[0].backward()


@pytest.mark.parametrize("preset", ["default", "mixture-of-depths"])
def test_blocks_that_are_computed_again_decide_the_same(preset: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "compiled", lambda x: True)  # for fused rotary embeddings
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        distillation = objective(preset)
        student = scramble(distillation.student)
        if again:
            student.checkpoint_blocks()
        for _ in range(2):  # the second step must not depend on what the first left
            student.zero_grad()
            step(distillation)
        found.append([parameter.grad for parameter in student.added_parameters().values()])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-3)


def test_a_block_more_is_few_launches(monkeypatch: pytest.MonkeyPatch):
    """The block counted has four gates, and the backward pass goes through its residual stream."""
    monkeypatch.setattr("students.student.attention_gradients", lambda *_: nullcontext())  # only for CPUs
    monkeypatch.setattr(ops, "compiled", lambda x: True)  # for fused rotary embeddings
    counted = []
    for blocks in (2, 3):
        distillation = objective("default", num_hidden_layers=blocks)
        step(distillation)
        with Launches() as launches:
            step(distillation)
        counted.append(launches.launched.total())
    assert counted[1] - counted[0] <= MOST


def test_padding_has_no_say_in_what_routing_pays() -> None:
    draw = torch.Generator().manual_seed(0)
    student = elasticize(make_tiny("llama"), StudentSpec((RouterSpec("token"),)))
    student.runtime.capacity = 0.1
    kinds = {"0.attn.token": RouterSpec("token"), "0.layer": RouterSpec("layer", selection="topk")}
    kinds["0.attn.head"] = RouterSpec("head")
    valid = torch.tensor([[False, False, True, True, True, True]])
    share = {key: torch.rand(1, 6, generator=draw) for key in kinds}
    score = {key: torch.randn(1, 6, 4 if "head" in key else 1, generator=draw) for key in kinds}
    loss, budget = LossConfig(topk_weight=1.0, load_balance_weight=1.0), BudgetConfig(control="capacity")
    whole = routing_loss(student, Decisions(share, score, kinds), loss, budget, 1, lambda key: valid)
    some = [{key: x[:, 2:] for key, x in made.items()} for made in (share, score)]
    assert float(whole) == pytest.approx(float(routing_loss(student, Decisions(*some, kinds), loss, budget, 1)))
