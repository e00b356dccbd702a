"""Zero-shot accuracy of student and teacher on multiple-choice tasks, with EleutherAI's lm-evaluation-harness.

Scoring reads whole texts at once, as prefill does, with the gates open that the student's dial opens. So a student
with a decode budget shows the quality of that budget here but saves no arithmetic: `compute` in a row is the cost of
the same text token by token, `compute_prefill` that of reading it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from elastic import launch
from elastic.data_parallel import sum_over_processes
from elastic.evaluation.rows import settings_of
from elastic.harness.loading import load_tasks
from elastic.harness.questions import file_task as file_task  # so that it can be imported from here, as before
from elastic.harness.scorer import Scorer
from elastic.reporting.progress import Say
from elastic.run import Run
from elastic.traits import TRAITS
from students.compute import PHASES
from teachers.quiet import quiet


def score_run(
    folder: str,
    tasks: Sequence[str],
    *,
    compute: Sequence[float] = (),
    limit: int | None = None,
    say: Say = print,
) -> list[dict[str, Any]]:
    """Measure a finished run of a language model and its teacher; return a row for each task and each budget.

    tasks: names of the harness's multiple-choice tasks, whose data comes from the hub, and paths of files of questions
    (see elastic/harness/questions.py). compute: the budgets (none given: where training left the dial, or for a range
    both ends and the middle). limit: the most questions of each task.

    Keys of a row: task; examples; accuracy, where the choice with the highest log-probability is the answer, and
    accuracy_norm, with log-probabilities divided by length in characters, if the task has it; the standard error of
    each as ..._stderr (not for a single question); the teacher's as teacher_...; agreement, the share of questions on
    which both prefer the same choice; compute and compute_prefill (see the module's docstring).
    """
    run = Run.open(folder, finished=True)
    config = run.config
    if not TRAITS[config.family].tasks:
        raise ValueError(f"--tasks are for language models; {config.model} is none")
    loaded = launch.main_process_first(lambda: load_tasks(tasks, say))
    teacher = launch.main_process_first(run.teacher)
    student: Any = launch.together(lambda: run.load_student(teacher, prepare=False))
    for asked in compute:
        student.set_compute(asked)  # raises for an unreachable budget before the teacher is scored
    rows = []
    for name, task in loaded.items():
        say(f"{name}: asking the teacher ...")
        scorer = Scorer(student, teacher.processor)
        with student.teacher():
            before, preferred = _ask(scorer, name, task, limit)
        for budget in tuple(compute) or config.budget.measured:
            say(f"{name}: asking the student{'' if budget is None else f' at {budget:g}'} ...")
            if budget is not None:
                student.set_compute(budget)
            scorer = Scorer(student, teacher.processor)
            after, chosen = _ask(scorer, name, task, limit)
            macs = [sum_over_processes(scorer.spent[phase], scorer.dense[phase]) for phase in PHASES]
            spent = {phase: own / dense for phase, (own, dense) in zip(PHASES, macs, strict=True)}
            rows.append(
                {
                    **settings_of(config, budget),
                    "task": name,
                    "examples": len(chosen),
                    "compute": spent["decode"],
                    "compute_prefill": spent["prefill"],
                    **after,
                    **{f"teacher_{key}": value for key, value in before.items()},
                    "agreement": sum(a == b for a, b in zip(chosen, preferred, strict=True)) / len(chosen),
                }
            )
    return rows


def _ask(scorer: Scorer, name: str, task: ConfigurableTask, limit: int | None) -> tuple[dict[str, float], list[int]]:
    """Return the accuracies with their standard errors, and the number of the preferred choice of each question."""
    with quiet(stderr=True):
        results = evaluate(scorer, {"tasks": {name: task}}, limit=limit, bootstrap_iters=100)
    measured = results["results"][name]
    keys = {"acc": "accuracy", "acc_stderr": "accuracy_stderr"}
    keys |= {"acc_norm": "accuracy_norm", "acc_norm_stderr": "accuracy_norm_stderr"}
    found = {key: measured.get(f"{metric},none") for metric, key in keys.items()}
    row = {key: float(value) for key, value in found.items() if value not in (None, "N/A")}
    preferred = []
    for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"]):
        scores = [score for score, _ in sample["filtered_resps"][: len(task.doc_to_choice(sample["doc"]))]]
        preferred.append(scores.index(max(scores)))
    return row, preferred
