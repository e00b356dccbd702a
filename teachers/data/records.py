"""Read the records of local files one by one; unreadable records are left out, and the others are still read."""

from __future__ import annotations

import codecs
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teachers.data.left_out import LeftOut
from teachers.quiet import first_line

TEXT_FILES = (".txt", ".md")
"""Endings of files that hold one text each."""
RECORD_FILES = (".jsonl", ".json", ".parquet")
"""Endings of files that hold records."""
_SYSTEM_FOLDERS = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""Folders that archives, servers and operating systems put beside a user's files."""
_HUB_DATASET = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?")
_ROWS = 64
"""Rows of a parquet file that are read together."""

Record = tuple[str, dict[str, Any]]
"""Place of a record (file and line, or row), and its fields."""


def local_records(file: Path, left_out: LeftOut) -> Iterator[Record]:
    """Yield the records of a file in order; a text file is one record with the field `text`.

    Raises ValueError with one line for a file that cannot be read as a whole.
    """
    kind = file.suffix.lower()
    try:
        if kind in TEXT_FILES:
            yield from _text(file, left_out)
        elif kind == ".parquet":
            yield from _parquet(file)
        else:
            yield from _json(file, left_out)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from error


def is_path(source: str) -> bool:
    """Return whether a name of data can only be a file or folder, not a hub data set."""
    begins_as_one = source.startswith((".", "/", "~")) or source.count("/") > 1
    return begins_as_one or Path(source).suffix.lower() in (*TEXT_FILES, *RECORD_FILES)


def hub_data_set(source: str, accepted: str, *, bare: bool = False) -> tuple[str, str | None]:
    """Return (name, configuration or None) of a hub data set written as `org/name:configuration`; bare: a name without
    `org/` is accepted, too. Raises ValueError, listing the kinds of data in `accepted`, for any other source."""
    match = _HUB_DATASET.fullmatch(source)
    if not match or is_path(source) or not (bare or "/" in match[1]):
        raise ValueError(f"no such file or folder: {source}; {accepted}")
    return match[1], match[2]


def visible(path: Path, root: Path) -> bool:
    """Return whether no part of a path below `root` is hidden or one of `_SYSTEM_FOLDERS`."""
    return not any(part.startswith(".") or part in _SYSTEM_FOLDERS for part in path.relative_to(root).parts)


def as_text(value: object) -> str:
    """Return a string as it is, and a number or truth value in JSON's notation; raise ValueError for anything else."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which no tokenizer accepts
            raise ValueError(f"is no valid Unicode: {error}") from None
        return value
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if value is None or isinstance(value, float):
        raise ValueError("is null")
    raise ValueError(f"is no text but {str(value)[:60]!r}")


def rows_of(value: Any) -> Any:
    """Return a dictionary of lists of one length, as parquet may store a list of dictionaries, as that list of
    dictionaries; any other value as it is. Raises ValueError if the lists differ in length."""
    lists = value.values() if isinstance(value, dict) and value else ()
    columns = [column for column in lists if column is not None]
    if not columns or not all(isinstance(column, list) for column in columns):
        return value
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"the lists of {', '.join(value)} differ in length")
    names = [name for name, column in value.items() if column is not None]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _text(file: Path, left_out: LeftOut) -> Iterator[Record]:
    try:
        yield str(file), {"text": file.read_text(encoding=_encoding(file))}
    except UnicodeError as error:
        left_out.add(str(file), str(file), f"cannot be read as UTF-8: {error}")


def _encoding(file: Path) -> str:
    """Return UTF-16 if a file begins with the byte order mark that Windows writes, else UTF-8."""
    with file.open("rb") as opened:
        return "utf-16" if opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from error


def _json(file: Path, left_out: LeftOut) -> Iterator[Record]:
    """Yield the records of a file of JSON lines, of a JSON list, or of a single JSON record."""
    whole, wide = None, _encoding(file) == "utf-16"
    try:
        opened = io.BytesIO(file.read_text("utf-16").encode()) if wide else file.open("rb")
    except UnicodeError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    with opened:
        start = opened.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        opened.seek(0)
        if start == b"[" or file.suffix.lower() == ".json":
            try:
                whole = json.loads(opened.read().removeprefix(codecs.BOM_UTF8))
            except (ValueError, RecursionError) as error:
                if start == b"[":
                    raise ValueError(f"{file} cannot be read: {first_line(error)}") from error
                opened.seek(0)
        if whole is not None:
            for number, record in enumerate(whole if isinstance(whole, list) else [whole], 1):
                yield from _record(f"{file}, record {number}", record, left_out)
            return
        for number, line in enumerate(opened, 1):
            if not (line := line.removeprefix(codecs.BOM_UTF8).strip()):
                continue
            where = f"{file}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                left_out.add(where, where, f"cannot be read: {first_line(error)}")
                continue
            yield from _record(where, record, left_out)


def _record(where: str, record: Any, left_out: LeftOut) -> Iterator[Record]:
    if isinstance(record, dict):
        yield where, record
    else:
        left_out.add(where, where, f"is no record but {str(record)[:60]!r}")
