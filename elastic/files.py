"""Files that are complete or absent, never half-written."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """A text file, written under a temporary name and then renamed."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # a disk that nothing can be written to refuses that as well
            part.unlink(missing_ok=True)
