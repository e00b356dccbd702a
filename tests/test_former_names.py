"""Names that scripts import from modules as they were before the packages had subpackages still exist there."""

from __future__ import annotations

from importlib import import_module

import pytest


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("elastic.generate", "_open"),
        ("elastic.tasks", "Scorer"),
        ("elastic.tasks", "file_task"),
        ("teachers.questions", "load_questions"),
        ("teachers.text", "load_text"),
    ],
)
def test_they_are_still_there(module: str, name: str) -> None:
    assert callable(getattr(import_module(module), name))
