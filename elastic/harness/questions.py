"""Files of questions as tasks of the harness."""

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
"""Underscores that are no part of a word."""


class ClozeTask(ConfigurableTask):
    """Questions with one blank each, in which a choice is put.

    What follows the blank is scored, as the harness does with WinoGrande: choices are judged by what they lead to.
    Where no word follows, the choice itself is scored.
    """

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **options: Any) -> list[Instance]:
        parts = _around_blank(doc["question"])
        assert parts is not None  # or the task is none of this kind
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
    with quiet(stderr=True):
        return (ClozeTask if blanks else ConfigurableTask)(config=config)


def questions(path: Path) -> list[dict[str, Any]]:
    """The questions of a file, one JSON object a line: `question`, `choices` (texts) and `answer`, the number of the
    right one from 0. ValueError names the line that is none."""
    if not path.is_file():
        raise ValueError(f"no such file of questions: {path}")
    records = []
    with one_line(f"{path} cannot be read"):
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold the other ends of lines
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
