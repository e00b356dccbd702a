"""Files of questions as multiple-choice tasks of the harness."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from teachers.data.records import as_text
from teachers.quiet import one_line, quiet

_BLANK = re.compile(r"(?<![^\W_])_+(?![^\W_])")
"""Matches a run of underscores that is not part of a word: a blank."""


class ClozeTask(ConfigurableTask):
    """A task of questions with one blank each, which is filled with each choice in turn.

    As the harness does for WinoGrande, the text after the blank is scored, given the question up to and including the
    choice. If no word follows the blank, the choice itself is scored.
    """

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **options: Any) -> list[Instance]:
        parts = _around_blank(doc["question"])
        assert parts is not None  # `file_task` uses this class only if every question has one blank
        before, after = parts
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
    """Return the text before and after a question's only blank; None if it has no blank, or several."""
    parts = _BLANK.split(question)
    return (parts[0], parts[1]) if len(parts) == 2 else None


def file_task(path: Path) -> ConfigurableTask:
    """Return a file of questions as a task of the harness.

    The prompt is "Question: ...\\nAnswer:", as in the harness's ARC tasks; if every question has exactly one blank,
    `_`, the task is a `ClozeTask`.
    """
    import datasets

    records = questions(path)
    parts = [_around_blank(record["question"]) for record in records]
    blanks = all(parts)
    # if a word follows the blank, all choices have the same continuation, and acc_norm, which divides by its length,
    # would equal acc
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
    with quiet(stderr=True):
        return (ClozeTask if blanks else ConfigurableTask)(config=config)


def questions(path: Path) -> list[dict[str, Any]]:
    """Return the questions of a file with one JSON object per line: `question`, `choices` (texts) and `answer`, the
    index of the right choice from 0. ValueError names the first line that is not such an object."""
    if not path.is_file():
        raise ValueError(f"no such file of questions: {path}")
    records = []
    with one_line(f"{path} cannot be read"):
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may contain other separators
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            question, answer, given = (record[key] for key in ("question", "answer", "choices"))
            choices = [as_text(choice).strip() for choice in given] if isinstance(given, list) else []
        except (ValueError, TypeError, KeyError):
            question, answer, choices = None, None, []
        right = len(choices) > 1 and all(choices) and type(answer) is int and 0 <= answer < len(choices)
        if not (isinstance(question, str) and question.strip() and right):
            raise ValueError(
                f"{path}, line {number}: a JSON object is expected with `question` (text), `choices` (two texts or "
                "more) and `answer` (the number of the right one, from 0)"
            )
        if len(set(choices)) < len(choices):
            raise ValueError(f"{path}, line {number}: two of its choices are the same: {', '.join(choices)[:200]}")
        records.append({"question": question, "choices": choices, "answer": answer})
    if not records:
        raise ValueError(f"{path} holds no questions")
    return records
