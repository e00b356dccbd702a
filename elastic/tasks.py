"""Zero-shot accuracy on multiple-choice tasks, student and teacher side by side, by EleutherAI's lm-evaluation-harness.

The harness makes the requests, compares and adds up; here are files of questions as tasks of it, and the student as a
model of it. A request is a context and a continuation; what counts is the continuation's log-probability.

Scoring reads whole texts at once, as prefill does, but with the choices that the student's dial makes. A student whose
budget is one of decoding shows the quality of that budget here and saves no arithmetic: `compute` of a row says what
the same text would cost token by token, `compute_prefill` what reading it at once does.
"""

from __future__ import annotations

import difflib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from torch import Tensor

from elastic import families
from elastic.reporting.progress import Watched
from elastic.run import Run
from losses import default_chunk_rows
from students.compute import PHASES
from students.families.language import LanguageStudent
from teachers import hub
from teachers.families.language import require_rows
from teachers.quiet import first_line, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 2048
"""Tokens that are scored together."""
LONGEST = 2048
"""Tokens that a model reads at once where its configuration does not say."""

_BLANK = re.compile(r"(?<![^\W_])_+(?![^\W_])")
"""Underscores that are no part of a word."""

Request = tuple[tuple[str, str], list[int], list[int]]
"""What the harness hands over: (texts, tokens of the context, tokens of the continuation)."""


class Scorer(TemplateLM):
    """A student as the harness sees a language model.

    Texts of one length make a batch, so that nothing is padded and no decision can depend on padding; routers that
    decide per sequence look at the context only; the LM head runs where a continuation is scored.
    """

    backend = "causal"

    def __init__(self, student: LanguageStudent, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.student = student
        self.tokenizer = tokenizer
        config = student.model.config.get_text_config()
        self.longest = getattr(config, "max_position_embeddings", None) or LONGEST
        self.spent = dict.fromkeys(PHASES, 0.0)
        """Multiply-accumulates of the student for all tokens so far, by phase."""
        self.dense = dict.fromkeys(PHASES, 0.0)
        """Those of the teacher."""

    @property
    def eot_token_id(self) -> int:
        """The end of a text, which stands in front of a continuation without context if there is no BOS token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a continuation without context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around one unless told otherwise."""
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the most likely continuation) for each request."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Request], **options: Any) -> list[tuple[float, bool]]:
        numbers: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise ValueError(
                    f"nothing can be scored of {texts[1][:40]!r}: it has no token of its own in this place"
                )
            read = tuple((context + continuation)[-self.longest - 1 : -1])
            given = len(read) + 1 - len(continuation)
            if given < 1:
                raise ValueError(f"a choice has {len(continuation)} tokens, too many for this model: {texts[1][:40]!r}")
            # choices that differ in their last token only have the same text to be read
            numbers.setdefault((read, given), []).append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        batches = []
        for length, same in groupby(sorted(numbers, key=lambda text: -len(text[0])), lambda text: len(text[0])):
            texts, size = list(same), max(1, BATCH_TOKENS // length)
            batches += [texts[first : first + size] for first in range(0, len(texts), size)]
        for batch in Watched(batches):
            continuations = [[requests[number][2] for number in numbers[text]] for text in batch]
            for text, scores in zip(batch, self._score(batch, continuations), strict=True):
                for number, score in zip(numbers[text], scores, strict=True):
                    answers[number] = score
        return answers

    @torch.no_grad()
    def _score(
        self, batch: list[tuple[tuple[int, ...], int]], continuations: list[list[list[int]]]
    ) -> Iterator[list[tuple[float, bool]]]:
        """For each text of one length (tokens, how many of them are context) the scores of its continuations."""
        student = self.student
        device = student.model.device
        ids = torch.tensor([read for read, _ in batch], device=device)
        require_rows(student.model, self.tokenizer, ids)
        given = torch.tensor([given for _, given in batch], device=device)[:, None]
        places = torch.arange(ids.shape[1], device=device)
        out, decisions = student.features(ids, prompt=places < given)
        rows = out.last_hidden_state[places >= given - 1]
        # the k-th continuation of each text, row by row; those that have fewer repeat their first
        most = max(map(len, continuations))
        columns = [[choices[k] if k < len(choices) else choices[0] for choices in continuations] for k in range(most)]
        targets = torch.tensor([[t for choice in column for t in choice] for column in columns], device=device).T
        tensors = student.head_tensors()
        size = default_chunk_rows(student.model.config.get_text_config().vocab_size, rows.dtype, device)
        scores, hits, shares = [], [], []
        for part, target in zip(rows.split(size), targets.split(size), strict=True):
            logits, share = student.logits(part, *tensors)
            logits = logits.float()
            scores.append(logits.gather(1, target) - logits.logsumexp(1, keepdim=True))
            hits.append(logits.argmax(1, keepdim=True) == target)
            shares.append(share)
        self._count(ids, decisions, None if shares[0] is None else torch.cat(shares).mean())
        lengths = [len(choices[0]) for choices in continuations]
        for choices, score, hit in zip(
            continuations, torch.cat(scores).split(lengths), torch.cat(hits).split(lengths), strict=True
        ):
            found = zip(score.sum(0).tolist(), hit.all(0).tolist(), strict=True)
            yield [answer for answer, _ in zip(found, choices, strict=False)]

    def _count(self, ids: Tensor, decisions: Any, share: Tensor | None) -> None:
        """Add what these texts cost; the head's cost is that of the rows it ran on, taken for all tokens."""
        compute = self.student.compute
        valid = torch.ones_like(ids, dtype=torch.bool)
        for phase in PHASES:
            head = float(compute.routed_head(share, phase)) * ids.numel()
            self.spent[phase] += float(compute.routed_blocks(decisions, valid, phase).sum()) + head
            self.dense[phase] += float(compute.dense(valid, phase).sum())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Not for multiple choice."""
        raise NotImplementedError

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Not for multiple choice."""
        raise NotImplementedError


def score_run(
    folder: str,
    tasks: Sequence[str],
    *,
    compute: Sequence[float] = (),
    limit: int | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Zero-shot accuracy of a finished run of a language model and of its teacher: a row for each task and each compute
    that the dial is turned to (none: as training left it, and of a run for a range at either end and in the middle).

    tasks: names of the harness's multiple-choice tasks, whose data comes from the hub, and paths of files of questions
    (see `questions`). limit: only so many questions of each.

    Keys: task; examples; accuracy, by the log-probability of the choices, and accuracy_norm, by that over their length
    in characters, where the task has it, each with _stderr (but of one question) and as teacher_...; agreement, the
    share of questions on which both prefer the same choice; compute and compute_prefill (see the module's docstring).
    """
    run = Run.open(folder, finished=True)
    config = run.config
    if not families.TRAITS[config.family].tasks:
        raise ValueError(f"--tasks are for language models; {config.model} is none")
    loaded = load_tasks(tasks, say)
    teacher = run.teacher()
    student = run.load_student(teacher)
    for budget in compute:
        student.set_compute(budget)  # a mistake here should not have to wait for the teacher
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
            spent = {phase: scorer.spent[phase] / scorer.dense[phase] for phase in PHASES}
            rows.append(
                {
                    "model": config.model,
                    "family": config.family,
                    "preset": config.preset,
                    "phase": config.budget.phase,
                    "compute_target": config.budget.target if budget is None else budget,
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
    """(accuracies with their standard errors, the preferred choice of each question)."""
    with _silent():
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


def load_tasks(items: Sequence[str], say: Callable[[str], None] = print) -> dict[str, ConfigurableTask]:
    """Tasks by name, zero-shot, of names that the harness knows and of paths. ValueError for what is none of both."""
    if not items:
        raise ValueError(
            "--tasks names no task: give names of the harness and paths of files, with commas between them"
        )
    paths = {item: Path(item).expanduser() for item in items}
    files = {item for item, path in paths.items() if path.is_file() or path.suffix or len(path.parts) > 1}
    found = [(paths[item].stem, file_task(paths[item])) for item in items if item in files]
    names = [item for item in items if item not in files]
    if names:
        say("reading the harness's list of tasks ...")
        found += _harness_tasks(names)
    tasks: dict[str, ConfigurableTask] = {}
    for name, task in found:
        if name in tasks:
            raise ValueError(f"two tasks are called {name}: measure them one after the other")
        if task.OUTPUT_TYPE != "multiple_choice":
            raise ValueError(
                f"{name} is no multiple-choice task but one of {task.OUTPUT_TYPE}, which --tasks is not for"
            )
        task.set_config(key="num_fewshot", value=0)
        tasks[name] = task
    return tasks


def _harness_tasks(names: Sequence[str]) -> list[tuple[str, ConfigurableTask]]:
    """The harness's own tasks; a group's or tag's all."""
    from lm_eval.tasks import TaskManager

    with _silent():
        manager = TaskManager()
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"the harness has no task {name!r}: {hint}`lm-eval ls tasks` lists them; files go by path")
    reason = hub.unreachable()
    found = []
    for name in names:
        try:
            with _silent(), hub.offline() if reason else nullcontext():
                found += manager.load([name])["tasks"].items()
        except Exception as error:  # datasets, the HTTP library and the tasks' own code each have their classes
            if reason:
                raise ValueError(
                    f"the data of {name} comes from the hub, which cannot be reached ({reason}), and is not in the "
                    "cache; a file of questions goes by its path: --tasks FILE.jsonl"
                ) from error
            raise ValueError(f"the task {name} cannot be loaded: {first_line(error)}") from error
    return found


class ClozeTask(ConfigurableTask):
    """Questions with one blank each, in which a choice is put.

    What follows the blank is scored, as the harness does with WinoGrande: choices are judged by what they lead to.
    Where no word follows, the choice itself is scored.
    """

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **options: Any) -> list[Instance]:
        before, after = _around_blank(doc["question"])
        context = before.rstrip()
        if any(letter.isalnum() for letter in after):
            pairs = [(before + choice, after.rstrip()) for choice in doc["choices"]]
        else:
            pairs = [(context, before[len(context) :] + choice) for choice in doc["choices"]]
        options = {
            name: value for name, value in options.items() if name not in ("apply_chat_template", "chat_template")
        }
        return [Instance("loglikelihood", doc, pair, number, **options) for number, pair in enumerate(pairs)]


def _around_blank(question: str) -> tuple[str, str] | None:
    """The text before and after a question's one blank; None where there is none, or several."""
    parts = _BLANK.split(question)
    return (parts[0], parts[1]) if len(parts) == 2 else None


def file_task(path: Path) -> ConfigurableTask:
    """A file of questions as a task of the harness.

    Asked is "Question: ...\\nAnswer:", as the harness asks ARC; but where every question has one blank, `_`, see
    `ClozeTask`.
    """
    import datasets

    records = questions(path)
    parts = [_around_blank(record["question"]) for record in records]
    blanks = all(parts)
    # where a word follows a blank, all choices have the same continuation, whose length says nothing
    shared = blanks and any(letter.isalnum() for part in parts if part for letter in part[1])
    config: dict[str, Any] = {
        "task": path.stem,
        "custom_dataset": lambda **options: {"test": datasets.Dataset.from_list(records)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in (["acc"] if shared else ["acc", "acc_norm"])
        ],
    }
    with _silent():
        return (ClozeTask if blanks else ConfigurableTask)(config=config)


def questions(path: Path) -> list[dict[str, Any]]:
    """The questions of a file, one JSON object a line: `question`, `choices` (texts) and `answer`, the number of the
    right one from 0. ValueError names the line that is none."""
    if not path.is_file():
        raise ValueError(f"no such file of questions: {path}")
    records = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            question, choices, answer = (record[key] for key in ("question", "choices", "answer"))
        except (ValueError, TypeError, KeyError):
            question = choices = answer = None
        texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
        right = texts and type(answer) is int and 0 <= answer < len(choices)
        if not (isinstance(question, str) and question.strip() and right):
            raise ValueError(
                f"{path}, line {number}: a JSON object is expected with `question` (text), `choices` (two texts or "
                "more) and `answer` (the number of the right one, from 0)"
            )
        records.append({"question": question, "choices": choices, "answer": answer})
    if not records:
        raise ValueError(f"{path} holds no questions")
    return records


@contextmanager
def _silent() -> Iterator[None]:
    """Within the block the harness says nothing: no remarks and no progress bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
