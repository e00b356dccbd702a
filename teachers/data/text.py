"""Text for causal language models: read files and data sets, tokenize them, pack them into windows of equal length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from teachers import hub
from teachers.data.conversations import FIELDS, turns_of
from teachers.data.corpus import corpus_file
from teachers.data.left_out import LeftOut
from teachers.data.records import RECORD_FILES, TEXT_FILES, Record, as_text, hub_data_set, local_records, visible
from teachers.quiet import first_line, one_line, quiet

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

FILES = (*TEXT_FILES, *RECORD_FILES)
"""File endings that are read."""

PAIRS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
"""Pairs of fields that make one document, the second below the first."""

_ACCEPTED_SOURCES = (
    "--data takes a .txt, .md, .jsonl, .json or .parquet file, a folder of such files, "
    "a hub data set (org/name or org/name:config), or builtin"
)
_ACCEPTED_COLUMNS = ", ".join(["text", "messages", *("+".join(pair) for pair in PAIRS), "conversations"])
_BATCH = 64
"""Documents read and tokenized together."""

_PIECE_CHARS = 1 << 22
"""Longer texts are tokenized in pieces, cut between lines; tokenizers need much memory for one very long string."""


@dataclass(frozen=True)
class TextData:
    """Token windows to train on, and others to measure on that share no text with them."""

    train: torch.Tensor
    """Token ids [N, window], int64, in the order of the source."""
    held_out: torch.Tensor
    """Token ids [M, window], int64."""
    description: str
    """What the text is, for the user to read."""
    tokens: int
    """Tokens read, training and held-out together."""
    left_out: tuple[LeftOut, ...] = ()
    """Records that cannot be used."""


def load_text(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    held_out: float | int,
    seed: int,
    max_tokens: int | None = None,
) -> TextData:
    """Read `source`, set a part aside, and pack both parts into windows.

    `held_out` is a number of windows, or as a float below 1 a share of all tokens. Whole documents chosen by `seed` are
    set aside, and of the last one chosen only the end, so that a single long text gives up its tail. A document that
    occurs twice counts once. `max_tokens` stops the reading early. Raises ValueError with one line for a source that
    does not exist, cannot be read, is too short, or has mostly records that cannot be used.
    """
    left_out = LeftOut(source, "records")
    documents, tokens = _unique_documents(source, tokenizer, left_out, max_tokens)
    left_out.finish()
    bos = _bos(tokenizer)
    body = window - len(bos)
    wanted = held_out if isinstance(held_out, int) else max(1, round(held_out * tokens / body))
    train, aside = _set_aside(documents, wanted * body, seed)
    separator = _separator(tokenizer)
    data = TextData(
        train=_windows(_joined(train, separator), window, bos),
        held_out=_windows(_joined(aside, separator), window, bos)[:wanted],
        description=_describe(source, tokens),
        tokens=tokens,
        left_out=(left_out,),
    )
    if len(data.train) == 0 or len(data.held_out) < wanted:
        need, fewer = (wanted + 1) * body, tokens // body // 2
        raise ValueError(
            f"{source} is too short: {tokens:,} tokens found, {need:,} needed "
            f"({wanted} held-out windows and one training window of {window}; a document that occurs twice counts once)"
            + (f"; --set data.held_out={fewer} would do" if 0 < fewer < wanted else "")
            + (f"; {left_out}, {left_out.example}" if len(left_out) else "")
        )
    return data


def load_windows(source: str, tokenizer: PreTrainedTokenizerBase, *, window: int) -> torch.Tensor:
    """All of `source` in order as token windows [N, window], int64.

    One text file gives the tokens that the tokenizer gives for its whole text, cut every `window` tokens; a rest
    shorter than a window is left out. Where the tokenizer starts texts with a BOS token, each window starts with one.
    """
    bos, left_out = _bos(tokenizer), LeftOut(source, "records")
    documents = list(_tokenized(_texts(source, tokenizer, left_out, streaming=False), tokenizer))
    left_out.finish()
    windows = _windows(_joined(documents, _separator(tokenizer)), window, bos)
    if len(windows) == 0:
        found, needed = sum(map(len, documents)), window - len(bos)
        raise ValueError(f"{source} is too short: {found:,} tokens found, {needed:,} needed for one window")
    return windows


def _unique_documents(
    source: str, tokenizer: PreTrainedTokenizerBase, left_out: LeftOut, max_tokens: int | None
) -> tuple[list[np.ndarray], int]:
    """The token ids of each different document, at most `max_tokens` in total, and their total."""
    texts = _texts(source, tokenizer, left_out, streaming=max_tokens is not None)
    documents: list[np.ndarray] = []
    tokens = 0
    for ids in _tokenized(_without_repetitions(texts), tokenizer):
        documents.append(ids if max_tokens is None else ids[: max_tokens - tokens])
        tokens += len(documents[-1])
        if tokens == max_tokens:
            break
    return documents, tokens


def _without_repetitions(texts: Iterator[str]) -> Iterator[str]:
    seen: set[int] = set()
    for text in texts:
        if (key := hash(text)) not in seen:
            seen.add(key)
            yield text


def _set_aside(documents: list[np.ndarray], tokens: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Split documents into those that stay and those set aside, the latter holding at least `tokens` where possible."""
    cuts = [len(document) for document in documents]
    for index in np.random.default_rng(seed).permutation(len(documents)):
        if tokens <= 0:
            break
        cuts[index] = max(0, len(documents[index]) - tokens)
        tokens -= len(documents[index]) - cuts[index]
    pairs = list(zip(documents, cuts, strict=True))
    return [d[:cut] for d, cut in pairs if cut], [d[cut:] for d, cut in pairs if cut < len(d)]


def _joined(documents: list[np.ndarray], separator: list[int]) -> np.ndarray:
    """One stream of token ids with the separator between documents."""
    between = np.array(separator, np.int64)
    parts = [part for document in documents for part in (between, document)]
    return np.concatenate(parts[1:]) if parts else between[:0]


def _windows(stream: np.ndarray, window: int, bos: list[int]) -> torch.Tensor:
    """Cut a stream into windows [N, window], each starting with `bos`; an incomplete last one is left out."""
    body = window - len(bos)
    count = len(stream) // body
    rows = torch.from_numpy(stream[: count * body]).reshape(count, body)
    return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(count, -1), rows], dim=1)


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token in a list where the tokenizer puts one in front of a text (Llama 3, Gemma), else nothing.

    Such models were never trained on text without it, and some (Gemma) are useless there.
    """
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def _separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _tokenized(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Token ids of each text, int64; empty texts are left out.

    BOS and EOS around a text, such as a chat template's own, are taken off where windows and the places between
    documents get theirs.
    """
    bos, eos = _bos(tokenizer), _separator(tokenizer)
    while batch := list(islice(texts, _BATCH)):
        pieces = [list(_pieces(text)) for text in batch]
        with quiet():
            flat = iter(tokenizer([p for group in pieces for p in group], add_special_tokens=False)["input_ids"])
        for group in pieces:
            ids = [token for piece in islice(flat, len(group)) for token in piece]
            first, last = ids[:1] == bos, len(ids) - (ids[-1:] == eos)
            if first < last:
                yield np.array(ids[first:last], np.int64)


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of about `_PIECE_CHARS` that together are the text, at line starts where there are any."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = text.rfind("\n", start + 1, start + _PIECE_CHARS)
        end = end if end > start else start + _PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _texts(source: str, tokenizer: PreTrainedTokenizerBase, left_out: LeftOut, *, streaming: bool) -> Iterator[str]:
    """The documents of a source as plain text, in order; a record that gives none is left out."""
    for where, record in _records(source, left_out, streaming):
        try:
            text = _document(record, tokenizer)
        except ValueError as error:
            left_out.add(where, where, error)
        else:
            left_out.used += 1
            yield text


def _records(source: str, left_out: LeftOut, streaming: bool) -> Iterator[Record]:
    """The records of local files, or of a hub data set; ValueError for what is none of both."""
    files = [corpus_file()] if source == "builtin" else _local_files(source)
    for file in files:
        yield from local_records(file, left_out)
    if files:
        return
    rows, number = iter(_hub(source, streaming)), 0
    while True:
        with one_line(f"{source} cannot be read"), quiet():
            row = next(rows, None)
        if row is None:
            return
        number += 1
        yield f"{source}, row {number}", row


def _hub(source: str, streaming: bool) -> Dataset | IterableDataset:
    """A hub data set, from the cache where the hub cannot be reached."""
    name, config = hub_data_set(source, _ACCEPTED_SOURCES)
    import datasets

    datasets.disable_progress_bars()
    reason = hub.unreachable()
    try:
        with hub.offline() if reason else contextlib.nullcontext():
            return datasets.load_dataset(name, config, split="train", streaming=streaming and not reason)
    except Exception as error:
        if reason:
            raise ValueError(
                f"no such file or folder: {source}; as a hub data set it is not in the cache, and the hub cannot be "
                f"reached ({reason}); {_ACCEPTED_SOURCES}"
            ) from error
        raise ValueError(f"{source} cannot be read: {first_line(error)}") from error


def _local_files(source: str) -> list[Path]:
    """The data files that a path stands for, sorted, hidden ones left out; empty where there is no such path."""
    path = Path(source).expanduser()
    if path.is_dir():
        every = (file for file in path.rglob("*") if file.suffix.lower() in FILES and file.is_file())
        files = sorted(file for file in every if visible(file, path))
        if not files:
            raise ValueError(f"no {', '.join(FILES)} file in folder {source}; {_ACCEPTED_SOURCES}")
        return files
    if path.is_file() and path.suffix.lower() not in FILES:
        raise ValueError(f"unknown kind of file: {source}; {_ACCEPTED_SOURCES}")
    return [path] if path.is_file() else []


def _document(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a record, by the fields it has. ValueError says why there is none."""
    filled = [name for name, value in record.items() if value is not None]
    if "text" in filled and "messages" not in filled:
        return _field(record, "text")
    if conversation := next((name for name in FIELDS if name in filled), None):
        return _conversation(record[conversation], tokenizer)
    pair = next((pair for pair in PAIRS if set(pair) <= set(filled)), None)
    if pair is None:
        fields = ", ".join(name if name in filled else f"{name} (null)" for name in record)
        raise ValueError(f"it has the fields {fields}; one of these is needed: {_ACCEPTED_COLUMNS}")
    parts = [_field(record, name) for name in pair]
    if "input" in filled and pair[0] == "instruction":  # Alpaca's: what the instruction is about
        parts.insert(1, _field(record, "input"))
    asked, answer = [part for part in parts[:-1] if part], parts[-1]
    return "\n".join([*asked, answer]) if asked else answer


def _field(record: dict[str, Any], name: str) -> str:
    try:
        return as_text(record[name])
    except ValueError as error:
        raise ValueError(f"its {name} {error}") from None


def _conversation(value: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation in the tokenizer's chat template, or as "role: content" lines where it has none."""
    turns = turns_of(value)
    if any(turn.images for turn in turns):
        raise ValueError("it holds an image")
    if not tokenizer.chat_template:
        if any("tool_calls" in turn.others for turn in turns):
            raise ValueError("it calls tools, and the model has no chat template to say so")
        return "\n".join(f"{turn.role}: {turn.text}" for turn in turns)
    messages = [{**turn.others, "role": turn.role, "content": turn.text} for turn in turns]
    with one_line("the model's chat template refuses it"):
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    return text


def _describe(source: str, tokens: int) -> str:
    count = f"{tokens / 1e6:.1f} M" if tokens >= 1e6 else f"{tokens:,}"
    origin = "documentation prose from installed Python packages" if source == "builtin" else source
    return f"{count} tokens of {origin}"
