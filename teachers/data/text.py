"""Text for causal language models: read files and data sets, tokenize them, pack them into windows of equal length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from teachers import hub
from teachers.data.conversations import FIELDS, turns_of
from teachers.data.corpus import corpus_file
from teachers.data.kinds import TEXT
from teachers.data.left_out import LeftOut
from teachers.data.parts import HELD_OUT_NAMES, TRAIN_NAMES, is_held_out
from teachers.data.records import Record, as_text, hub_data_set, local_records
from teachers.quiet import first_line, one_line, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
"""Pairs of fields that make one document, the second below the first."""

_ACCEPTED_COLUMNS = ", ".join(["text", "messages", *("+".join(pair) for pair in PAIRS), "conversations"])
_Part = Sequence[Path] | str
"""One part of a source: its files, or the name of its split on the hub."""
_BATCH = 64
"""Number of documents that are tokenized together."""

_PIECE_CHARS = 1 << 22
"""Length above which a text is tokenized in pieces, cut between lines: tokenizers need much memory for a very long
string."""


@dataclass(frozen=True)
class TextData:
    """Token windows to train on, and held-out windows to measure on that share no text with them."""

    train: torch.Tensor
    """Token ids [N, window], int64, in the order of the source."""
    held_out: torch.Tensor
    """Token ids [M, window], int64."""
    description: str
    """Number of tokens and source, for the user to read."""
    tokens: int
    """Number of tokens read, training and held-out together."""
    left_out: tuple[LeftOut, ...] = ()
    """Records that cannot be used."""
    held_out_from: str = ""
    """The source's own held-out part: a file with the number of others, or a split; empty if it has none."""


def load_text(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    held_out: int,
    seed: int,
    max_tokens: int | None = None,
) -> TextData:
    """Read `source`, and pack the part to train on and a part set aside, `held_out` windows, into windows.

    Those set aside come from the source's own held-out part, as many as it has, or else from the training part:
    documents chosen by `seed` are set aside whole, and of the last one chosen only the end, so that a single long text
    gives up its tail. A document that occurs twice counts once. Reading a part stops after `max_tokens` tokens. Raises
    a one-line ValueError for a source that does not exist, cannot be read, is too short, or has mostly records that
    cannot be used.
    """
    part, other = _parts(source)
    if part is None:
        raise ValueError(
            f"{source} has no text to train on, only a held-out part ({_named(other)}); to train on such a file, name "
            "it itself"
        )
    left_out, seen = LeftOut(source, "records"), set[int]()
    named, documents = (
        [] if one is None else _unique_documents(source, one, tokenizer, left_out, seen, max_tokens)
        for one in (other, part)
    )
    left_out.finish()
    bos, separator = _bos(tokenizer), _separator(tokenizer)
    body, tokens = window - len(bos), sum(map(len, (*named, *documents)))
    train, aside = _set_aside(documents if other is None else named, held_out * body, seed)
    data = TextData(
        train=_windows(_joined(train if other is None else documents, separator), window, bos),
        held_out=_windows(_joined(aside, separator), window, bos)[:held_out],
        description=_describe(source, tokens),
        tokens=tokens,
        left_out=(left_out,),
        held_out_from=_named(other),
    )
    if other is not None and not len(data.held_out):
        raise ValueError(
            f"{source} is too short: {sum(map(len, named)):,} tokens found in its held-out part ({_named(other)}), "
            f"{body:,} needed for one window; files of other names are trained on"
        )
    if len(data.train) == 0 or (other is None and len(data.held_out) < held_out):
        need, fewer = (held_out + 1) * body, tokens // body // 2
        raise ValueError(
            f"{source} is too short: {tokens:,} tokens found, {need:,} needed ({held_out} held-out windows and one "
            f"training window of {window}; a document that occurs twice counts once)"
            + (f"; --set data.held_out={fewer} would do" if 0 < fewer < held_out else "")
            + (f"; {left_out}, {left_out.example}" if len(left_out) else "")
        )
    return data


def has_held_out_part(source: str) -> bool:
    """Return whether a source has a held-out part of its own."""
    return _parts(source)[1] is not None


def load_windows(source: str, tokenizer: PreTrainedTokenizerBase, *, window: int) -> torch.Tensor:
    """Return a source's own held-out part, or all of it if it has none, in order, as token windows [N, window], int64.

    A text file is tokenized as a whole and cut every `window` tokens; a rest shorter than a window is left out. If the
    tokenizer starts texts with a BOS token, each window starts with one.
    """
    bos, left_out = _bos(tokenizer), LeftOut(source, "records")
    train, other = _parts(source)
    part = other or train
    assert part is not None  # every source has at least one of the two parts
    documents = list(_tokenized(_texts(source, part, tokenizer, left_out, streaming=False), tokenizer))
    left_out.finish()
    windows = _windows(_joined(documents, _separator(tokenizer)), window, bos)
    if len(windows) == 0:
        found, needed = sum(map(len, documents)), window - len(bos)
        raise ValueError(f"{source} is too short: {found:,} tokens found, {needed:,} needed for one window")
    return windows


def _unique_documents(
    source: str,
    part: _Part,
    tokenizer: PreTrainedTokenizerBase,
    left_out: LeftOut,
    seen: set[int],
    max_tokens: int | None,
) -> list[np.ndarray]:
    """Return the token ids of each document of a part that is not yet in `seen`, at most `max_tokens` in total."""
    texts = _texts(source, part, tokenizer, left_out, streaming=max_tokens is not None)
    documents: list[np.ndarray] = []
    tokens = 0
    for ids in _tokenized(_without_repetitions(texts, seen), tokenizer):
        documents.append(ids if max_tokens is None else ids[: max_tokens - tokens])
        tokens += len(documents[-1])
        if tokens == max_tokens:
            break
    return documents


def _without_repetitions(texts: Iterator[str], seen: set[int]) -> Iterator[str]:
    for text in texts:
        if (key := hash(text)) not in seen:
            seen.add(key)
            yield text


def _set_aside(documents: list[np.ndarray], tokens: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Split documents into those to train on and those set aside, the latter with at least `tokens` if possible."""
    cuts = [len(document) for document in documents]
    for index in np.random.default_rng(seed).permutation(len(documents)):
        if tokens <= 0:
            break
        cuts[index] = max(0, len(documents[index]) - tokens)
        tokens -= len(documents[index]) - cuts[index]
    pairs = list(zip(documents, cuts, strict=True))
    return [d[:cut] for d, cut in pairs if cut], [d[cut:] for d, cut in pairs if cut < len(d)]


def _joined(documents: list[np.ndarray], separator: list[int]) -> np.ndarray:
    """Return one stream of token ids with the separator between documents."""
    between = np.array(separator, np.int64)
    parts = [part for document in documents for part in (between, document)]
    return np.concatenate(parts[1:]) if parts else between[:0]


def _windows(stream: np.ndarray, window: int, bos: list[int]) -> torch.Tensor:
    """Cut a stream into windows [N, window], each starting with `bos`; an incomplete last window is left out."""
    body = window - len(bos)
    count = len(stream) // body
    rows = torch.from_numpy(stream[: count * body]).reshape(count, body)
    return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(count, -1), rows], dim=1)


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [BOS] if the tokenizer puts a BOS token in front of a text (Llama 3, Gemma), else an empty list.

    Models with such tokenizers were never trained on text without BOS, and some (Gemma) are useless without it.
    """
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def _separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _tokenized(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Yield the token ids of each text, int64; empty texts are left out.

    BOS and EOS around a text, such as a chat template writes, are removed if windows start with BOS and documents are
    separated by EOS anyway.
    """
    bos, eos = _bos(tokenizer), _separator(tokenizer)
    while batch := list(islice(texts, _BATCH)):
        pieces = [list(_pieces(text)) for text in batch]
        with quiet(), one_line("the model's tokenizer refuses the text"):
            flat = iter(tokenizer([p for group in pieces for p in group], add_special_tokens=False)["input_ids"])
        for group in pieces:
            ids = [token for piece in islice(flat, len(group)) for token in piece]
            first, last = ids[:1] == bos, len(ids) - (ids[-1:] == eos)
            if first < last:
                yield np.array(ids[first:last], np.int64)


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most `_PIECE_CHARS` characters, between lines if possible."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = text.rfind("\n", start + 1, start + _PIECE_CHARS)
        end = end if end > start else start + _PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _texts(
    source: str, part: _Part, tokenizer: PreTrainedTokenizerBase, left_out: LeftOut, *, streaming: bool
) -> Iterator[str]:
    """Yield the documents of a part as plain text, in order; records without a document are left out."""
    for where, record in _records(source, part, left_out, streaming):
        try:
            text = _document(record, tokenizer)
        except ValueError as error:
            left_out.add(where, where, error)
        else:
            left_out.used += 1
            yield text


def _records(source: str, part: _Part, left_out: LeftOut, streaming: bool) -> Iterator[Record]:
    """Yield the records of local files or of a split on the hub."""
    if not isinstance(part, str):
        for file in part:
            yield from local_records(file, left_out)
        return
    import datasets

    name, config = hub_data_set(source, TEXT.accepted)
    with _hub(source):
        streaming = streaming and not hub.unreachable()
        rows = iter(datasets.load_dataset(name, config, split=part, streaming=streaming))
    for number in count(1):
        with one_line(f"{source} cannot be read"), quiet():
            row = next(rows, None)
        if row is None:
            return
        yield f"{source}, {part} row {number}", row


def _parts(source: str) -> tuple[_Part | None, _Part | None]:
    """Return the part to train on and the held-out part of a source, each None if it is missing. A file is all training
    part. Raises ValueError for a source that is neither local nor on the hub."""
    path = Path(source).expanduser()
    if source == "builtin":
        return [corpus_file()], None
    if path.exists():
        TEXT.require(path)
        if path.is_file():
            return [path], None
        files = sorted(TEXT.found(path))
        train, other = ([f for f in files if is_held_out(f.relative_to(path)) != train] for train in (True, False))
        return train or None, other or None
    name, config = hub_data_set(source, TEXT.accepted)
    import datasets

    with _hub(source):
        splits = datasets.get_dataset_split_names(name, config)
    found = [next((part for part in names if part in splits), None) for names in (TRAIN_NAMES, HELD_OUT_NAMES)]
    if found == [None, None]:
        raise ValueError(f"{source} has the splits {', '.join(splits)}; {' or '.join(TRAIN_NAMES)} is needed")
    return found[0], found[1]


@contextlib.contextmanager
def _hub(source: str) -> Iterator[None]:
    """Context for reading a hub data set, from the cache if the hub cannot be reached; an error takes one line."""
    import datasets

    datasets.disable_progress_bars()
    reason = hub.unreachable()
    try:
        with hub.offline() if reason else contextlib.nullcontext(), quiet():
            yield
    except Exception as error:
        if reason:
            raise ValueError(
                f"no such file or folder: {source}; as a hub data set it is not in the cache, and the hub cannot be "
                f"reached ({reason}); {TEXT.accepted}"
            ) from error
        raise ValueError(f"{source} cannot be read: {first_line(error)}") from error


def _named(part: _Part | None) -> str:
    """Return a part for the user to read."""
    if part is None or isinstance(part, str):
        return f"the split {part}" if part else ""
    return f"{part[0]}" + (f" and {len(part) - 1} more" if len(part) > 1 else "")


def _document(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a record, chosen by the fields it has; raise ValueError, saying why, if there is none."""
    filled = [name for name, value in record.items() if value is not None]
    if "text" in filled and "messages" not in filled:
        if isinstance(record["text"], bool | int | float):  # an answer may be one, a document is none
            raise ValueError(f"its text is no text but {record['text']}")
        return _field(record, "text")
    if conversation := next((name for name in FIELDS if name in filled), None):
        return _conversation(record[conversation], tokenizer)
    pair = next((pair for pair in PAIRS if set(pair) <= set(filled)), None)
    if pair is None:
        fields = ", ".join(name if name in filled else f"{name} (null)" for name in record)
        raise ValueError(f"it has the fields {fields or 'none'}; one of these is needed: {_ACCEPTED_COLUMNS}")
    parts = [_field(record, name) for name in pair]
    if "input" in filled and pair[0] == "instruction":  # Alpaca's field for the input of the instruction
        parts.insert(1, _field(record, "input"))
    asked, answer = [part for part in parts[:-1] if part], parts[-1]
    return "\n".join([*asked, answer]) if asked else answer


def _field(record: dict[str, Any], name: str) -> str:
    try:
        return as_text(record[name])
    except ValueError as error:
        raise ValueError(f"its {name} {error}") from None


def _conversation(value: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a conversation in the tokenizer's chat template, or as "role: content" lines if it has none."""
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
