"""The builtin corpus holds prose alone, no text twice, and is collected once."""

from __future__ import annotations

from pathlib import Path

import pytest

from teachers.data import corpus
from teachers.data.text import load_text
from tests.pico.language import make_tokenizer

DOCSTRING = """
    Compute something that nobody needs.

    The *result* of this function depends on the ``order`` in which the values were given, because the first of them
    decides how all of the others are read. It is therefore best to sort them before they are handed to it.

    Parameters
    ----------
    values : list
        What is to be computed.

    Notes
    -----
    When there are no values at all, then the answer is not an error but the empty list, since every one of the
    conditions that are checked holds for nothing :cite:`nobody2020`, as it does in :func:`sorted <python.sorted>`.

    >>> compute([1, 2, 3])
    [1, 2, 3]

    This is free software: you can use it under the terms of the license that came with it, and it is given to you in
    the hope that it will be of use, but without any warranty of any kind, as far as that is at all possible.
    """


def test_corpus_keeps_prose_only():
    first, second = corpus.prose_paragraphs(DOCSTRING)
    assert first.startswith("The result of this function depends on the order in which")
    assert second.startswith("When there are no values") and second.endswith("as it does in sorted.")


def test_corpus_drops_repetitions(monkeypatch: pytest.MonkeyPatch):
    other = DOCSTRING.replace("Compute", "Calculate")
    monkeypatch.setattr(corpus, "_files", lambda: iter([[DOCSTRING], [other], ["no prose"]]))
    assert len(corpus.collect()) == 1


def test_builtin_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path))
    monkeypatch.setattr(corpus, "_files", lambda: iter([[DOCSTRING]]))
    data = load_text("builtin", make_tokenizer(), window=8, held_out=1, seed=0)
    assert "installed Python packages" in data.description
    monkeypatch.setattr(corpus, "collect", lambda: pytest.fail("built again"))
    assert load_text("builtin", make_tokenizer(), window=8, held_out=1, seed=0).tokens == data.tokens
    assert [path.suffix for path in (tmp_path / "text").iterdir()] == [".parquet"]
