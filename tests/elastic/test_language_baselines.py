"""Baselines of language models: each chooses channels as its name says, untrained, at the student's compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastic.accounting.language import measured_compute
from elastic.baselines import language as baselines
from elastic.config import make_config
from elastic.evaluate import measure_run
from elastic.evaluation.session import Session
from elastic.families import language
from elastic.run import load
from students import elasticize
from students.families.language import LanguageStudent
from tests.elastic.runs import Configure, silent
from tests.pico.language import make_tiny

RUN = ("data.held_out=16",)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 120, (8, 32), generator=torch.Generator().manual_seed(2))


def decode_meter(ids: Tensor) -> Callable[[LanguageStudent], float]:
    return lambda student: measured_compute(student, ids, "decode", 4)


def shares(student: LanguageStudent, ids: Tensor) -> dict[str, float]:
    return {key: float(share) for key, share in baselines._shares(student, [ids]).items()}


def test_a_row_for_each_baseline_at_the_students_compute(finished: Path):
    rows = measure_run(str(finished), baselines=language.BASELINES, say=silent)
    assert [row["preset"] for row in rows] == ["default", *language.BASELINES]
    own, random, uniform, static, teal = rows
    for row in rows[1:]:
        step = 0.03 if row is static else 0.015  # all layers gain a channel at once
        assert row["compute"] == pytest.approx(own["compute"], abs=step)
        assert row["trainable_parameters"] == row["checkpoint_bytes"] == 0
        assert row["tokens"] == own["tokens"] and row["teacher_perplexity"] == own["teacher_perplexity"]
    assert static["compute_prefill"] == pytest.approx(static["compute"], abs=0.05)  # they differ by attention
    assert teal["compute_prefill"] == 1.0  # saves and adds nothing in prefill
    assert random["compute_prefill"] == uniform["compute_prefill"] > 1.0  # added by the head's preview
    assert random["kl"] > max(uniform["kl"], teal["kl"]) and static["kl"] > uniform["kl"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "gemma2"])
def test_uniform_and_teal_keep_the_same_share_everywhere(name: str, ids: Tensor):
    config = make_config(model="smollm2-135m")
    for kind in ("uniform", "teal"):
        vocab = config.student.find("vocab") if kind == "uniform" else None
        same = baselines.SameShares(kind, vocab, lambda: make_tiny(name), config, ids.split(2))
        student = same.at(0.75, decode_meter(ids))
        open_ = shares(student, ids)
        assert ("vocab" in open_) == (kind == "uniform")
        assert max(open_.values()) - min(open_.values()) < 0.06
        assert decode_meter(ids)(student) == pytest.approx(0.75, abs=0.003)
        limits = [layer.routers["channel"].log_limit for layer in baselines._sites(student).values()]
        assert all(bool((limit == limit[0]).all()) == (kind == "teal") for limit in limits)
        assert student.spec.lora.rank == 0


def test_static_reads_the_same_channels_for_every_token(ids: Tensor):
    config = make_config(model="smollm2-135m", budget__phase="prefill")

    def meter(student: LanguageStudent) -> float:
        return measured_compute(student, ids, "prefill", 4)

    student = baselines.SameShares("static", None, lambda: make_tiny("llama"), config, ids.split(2)).at(0.75, meter)
    with torch.no_grad():
        _, decisions = student(ids)
    channels = [share for key, share in decisions.share.items() if key.endswith("channel")]
    assert len(channels) == 12 and all((share == share.flatten()[0]).all() for share in channels)
    kept = [float(share.flatten()[0]) for share in channels]
    assert max(kept) - min(kept) < 0.04  # equal but for rounding to whole channels
    assert meter(student) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "gemma2"])
def test_random_opens_as_much_as_the_student(name: str, ids: Tensor):
    config = make_config(model="smollm2-135m", settings=["student.lora.rank=8"])
    student = elasticize(make_tiny(name), config.student)
    baselines.calibrate(student, ids.split(2), 0.75, "decode")
    compute = decode_meter(ids)(student)
    other = baselines.at_random(student, lambda: make_tiny(name), config, compute, ids.split(2))
    assert decode_meter(ids)(other) == pytest.approx(compute, abs=0.01)
    own, drawn = shares(student, ids), shares(other, ids)
    assert own.keys() == drawn.keys()
    # the baseline spends the compute of low-rank corrections, large in a model this small, on more open gates: the odds
    # of being open grow everywhere by one factor
    odds = [torch.tensor(drawn[key]).logit() - torch.tensor(own[key]).logit() for key in own if 0.02 < own[key] < 0.98]
    assert len(odds) > 5 and max(odds) - min(odds) < 0.4 and min(odds) > 0
    with torch.no_grad():
        x = torch.randn(1, 64, 32)
        layer = baselines._sites(other)["1.mlp_in"]
        first, second = (layer(x) for _ in range(2))
        assert not torch.equal(first, second)  # drawn anew in each call
        with other.teacher():
            assert torch.equal(other(ids)[0].logits, make_tiny(name)(ids).logits)


def test_a_baseline_leaves_the_student_alone_and_repeats(finished: Path, configure: Configure):
    student, config = load(finished), configure("data.held_out=16")
    windows = torch.randint(3, 120, (4, 32), generator=torch.Generator().manual_seed(3))
    before = language.evaluate(student, windows, config)
    for name in language.BASELINES:
        asked = name, student, windows, config, before["compute"]
        first, second = (language.baseline(*asked, Session()) for _ in range(2))
        assert first == second
    assert language.evaluate(student, windows, config) == before


def test_what_makes_no_sense_is_refused_in_one_line(ids: Tensor):
    prefill = make_config(model="smollm2-135m", budget__phase="prefill")
    decode = make_config(model="smollm2-135m")
    experts = make_config(model="smollm2-135m", preset="elastiformer")
    student = elasticize(make_tiny("llama"), decode.student)

    def frozen() -> PreTrainedModel:
        return make_tiny("llama")

    for name in ("uniform", "teal"):
        with pytest.raises(ValueError, match=f"{name} chooses channels token by token.*static does"):
            baselines.SameShares(name, None, frozen, prefill, ids.split(2))
    with pytest.raises(ValueError, match=r"teal cannot run at 0.100"):
        baselines.SameShares("teal", None, frozen, decode, ids.split(2)).at(0.1, decode_meter(ids))
    other = elasticize(make_tiny("llama"), experts.student)
    with pytest.raises(ValueError, match="this one has expert, head, token routers"):
        baselines.at_random(other, frozen, experts, 0.7, ids.split(2))
    student.set_compute(1.0)
    with pytest.raises(ValueError, match="this one routes nothing"):
        baselines.at_random(student, frozen, decode, 1.0, ids.split(2))


def test_merging_is_for_images(finished: Path):
    with pytest.raises(ValueError, match=r"no baseline tome for .*, only random, uniform, static, teal"):
        measure_run(str(finished), baselines=["tome"], say=silent)
