"""Measurements that share a session load models, run the teacher and calibrate once, and have the results of separate
ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import teachers
from elastic import trainer
from elastic.evaluate import measure_run
from elastic.evaluation.session import Session
from elastic.evaluation.teacher import TeacherOutputs
from elastic.families import language
from elastic.run import Run
from students import selfcheck
from students.families.language import LanguageStudent
from tests.elastic.cached import assert_learned
from tests.elastic.runs import Configure, silent

RUN = ("data.held_out=16", "budget.target=0.7:0.9")
BUDGETS = 0.9, 0.7


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts of models and data that were loaded ("load"), calibrations ("observe") and teacher passes ("features")."""
    seen: Counter[str] = Counter()
    monkeypatch.setenv(selfcheck.SWITCH, "off")  # it would run the teacher, too

    def watch(owner: object, name: str, counts: Callable[..., bool] = lambda *_: True) -> None:
        real = getattr(owner, name)

        def noted(*args: object, **options: object) -> object:
            seen[name] += counts(*args)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    watch(teachers, "load")
    watch(language, "load")
    watch(language, "observe")
    watch(LanguageStudent, "features", lambda self, *_: self.runtime.bypass and not torch.is_grad_enabled())
    return seen


@pytest.mark.thorough
def test_a_session_asks_once_and_says_what_runs_alone_say(finished: Path, asked: Counter[str]):
    def measured(budget: float, session: Session | None) -> list[dict]:
        return measure_run(str(finished), compute=[budget], baselines=language.BASELINES, session=session, say=silent)

    alone = [measured(budget, None) for budget in BUDGETS]
    each = len(BUDGETS)
    assert asked["load"] == 2 * each and asked["observe"] == each  # the model, and the data
    once, shared = Counter(asked), Session()
    together = [measured(budget, shared) for budget in BUDGETS]
    assert together == alone
    for name in ("load", "observe", "features"):
        assert asked[name] - once[name] == once[name] / each
    assert [rows[0] for rows in reversed(together)] == [
        measure_run(str(finished), compute=[b], say=silent)[0] for b in BUDGETS[::-1]
    ]


@pytest.mark.thorough
def test_runs_are_calibrated_once_whatever_their_budgets_and_presets(
    configure: Configure, asked: Counter[str], tmp_path: Path
):
    configs = [
        configure(preset="static", budget__target=0.9),
        configure(),
        configure(budget__target="0.7:0.9"),
        configure("train.seed=1"),
    ]
    session = Session(several=True)
    for number, config in enumerate(configs):
        trainer.distill(config, tmp_path / f"together-{number}", session=session, say=silent)
    assert asked["observe"] == 2  # each seed has its own windows
    for number in (1, 2):
        trainer.distill(configs[number], tmp_path / f"alone-{number}", say=silent)
        assert_learned(tmp_path / f"alone-{number}", tmp_path / f"together-{number}")


def test_another_model_ends_what_is_known(finished: Path, configure: Configure):
    """A session shares the weights of one model, and forgets all results when another model is loaded."""
    session, config = Session(), configure()
    first = session.teacher(config)
    again = session.teacher(config)
    assert first.model is not again.model
    assert all(a is b for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    other = session.teacher(configure("train.precision=bfloat16"))
    assert next(other.model.parameters()).dtype == torch.bfloat16
    assert session.once("key", lambda: 1) == session.once("key", lambda: 2) == 1
    session.teacher(config)
    assert session.once("key", lambda: 2) == 2
    assert session.student(Run.open(finished)).runtime.bypass is False


def test_outputs_come_back_from_a_file_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    made = [{"hidden": torch.randn(2, 5, 8).to(torch.bfloat16).transpose(1, 2), "said": ["a", "b"]} for _ in range(4)]
    kept = TeacherOutputs(room=2 * 80 * 2)  # for two of the four, in bytes
    for _ in range(2):
        for number, outputs in enumerate(made):
            found = kept.of(number, lambda number=number: made[number])
            assert torch.equal(found["hidden"], outputs["hidden"]) and found["said"] == ["a", "b"]
    assert (tmp_path / "cache").exists() and not list((tmp_path / "cache").iterdir())  # no file is left
