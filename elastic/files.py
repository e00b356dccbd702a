"""Writing files atomically: a file is complete or absent, never half-written."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it; raise OSError, with the path, if that fails."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # unlinking fails too on a read-only disk
            part.unlink(missing_ok=True)
