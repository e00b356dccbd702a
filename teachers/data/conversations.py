"""Read conversations in the usual formats: OpenAI's `role` and `content`, ShareGPT's `from` and `value`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from teachers.data.records import as_text, rows_of

FIELDS = ("messages", "conversations")
"""Names of the field of a record that holds a conversation."""
IMAGE = "<image>"
"""Placeholder of an image in LLaVA's conversations."""

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
}
"""Standard role by the names that formats use for user and assistant; other roles keep their names."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: str
    text: str
    images: tuple[Any, ...] = ()
    """Images among the turn's parts, each as given there (such as a path); None if the image is in another field of the
    record."""
    others: dict[str, Any] = field(default_factory=dict)
    """Fields besides role and content, such as tool calls."""


def turns_of(value: Any) -> list[Turn]:
    """Return the turns of a conversation, without empty system turns; raise ValueError if it is not a conversation."""
    if isinstance(value, str):  # tables without nested columns store a conversation as JSON
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    rows = rows_of(value)
    if not isinstance(rows, list):
        raise ValueError(f"its messages are no conversation but {str(rows)[:60]!r}")
    if not rows:
        raise ValueError("its messages are no conversation: there are no turns")
    turns = [_turn(number, row) for number, row in enumerate(rows, 1)]
    return [turn for turn in turns if turn is not None]


def questions_and_answers(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    """Return pairs of a question by the user and the assistant's answer, each without the turns before it.

    System turns and an assistant's opening turn are skipped; consecutive turns of one side are joined by newlines.
    Raises ValueError for turns of other roles, or if there is no pair.
    """
    pairs: list[tuple[list[str], list[str]]] = []
    for turn in turns:
        if turn.role == "user":
            if not pairs or pairs[-1][1]:
                pairs.append(([], []))
            pairs[-1][0].append(turn.text.replace(IMAGE, "").strip())
        elif turn.role == "assistant":
            if pairs:
                pairs[-1][1].append(turn.text.strip())
        elif turn.role != "system":
            raise ValueError(f"a turn of {turn.role!r} is neither a question nor an answer")
    found = [("\n".join(asked), "\n".join(said)) for asked, said in pairs if said]
    if not found:
        raise ValueError("no turn of the user is followed by one of the assistant")
    return found


def _turn(number: int, row: Any) -> Turn | None:
    """Return the turn of one row of a conversation; None for a system turn without content."""
    names = next((n for n in (("role", "content"), ("from", "value")) if isinstance(row, dict) and n[0] in row), None)
    if names is None or not isinstance(row[names[0]], str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"its messages are no conversation: turn {number} has no role, but {found}")
    role = _ROLES.get(row[names[0]].strip().lower(), row[names[0]].strip())
    others = {name: value for name, value in row.items() if name not in names and value is not None}
    content = row.get(names[1])
    if content is None and role == "system":
        return None
    if content is None and others.get("tool_calls"):
        content = ""
    try:
        return Turn(role, *_content(rows_of(content)), others)
    except ValueError as error:
        raise ValueError(f"the content of turn {number} ({role}) {error}") from None


def _content(content: Any) -> tuple[str, tuple[Any, ...]]:
    """Return the text of a turn and the images among its parts."""
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return as_text(content), ()
    texts: list[str] = []
    images: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("image", "image_url", "input_image"):
            given = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name)), None)
            images.append(given.get("url") if isinstance(given, dict) and "url" in given else given)
        elif isinstance(part, dict) and kind in (None, "text", "input_text", "output_text") and "text" in part:
            texts.append(as_text(part["text"]))
        else:
            raise ValueError(f"has a part of another kind than text and image: {kind or str(part)[:60]!r}")
    if not texts and not images:
        raise ValueError("has no parts")
    return "\n".join(texts), tuple(images)
