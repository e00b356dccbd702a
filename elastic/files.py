"""Writing files atomically, complete or not at all, and finding run folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote


class Unwritable(OSError):
    """A file cannot be written, as on a full disk: whatever else a command would write there fails too."""


@contextmanager
def writing(path: Path | None = None) -> Iterator[None]:
    """Context, or decorator, in which errors of the system are those of a file that cannot be written: Unwritable, with
    its path (None: it is in their messages)."""
    try:
        yield
    except OSError as error:
        said = str(error) if path is None else f"cannot write {path}: {error.strerror or error}"
        raise Unwritable(said) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it; raise Unwritable, with the path, if that fails."""
    part = path.with_name(f".{path.name}.part")
    try:
        with writing(path):
            part.write_text(text, encoding="utf-8")
            part.replace(path)
    finally:
        with suppress(OSError):  # unlinking fails too on a read-only disk
            part.unlink(missing_ok=True)


def append_line(path: Path, line: str, *, sync: bool = False) -> None:
    """Append a line to a text file, with `sync` down to the disk; raise Unwritable, with the path, if that fails, in
    which case no part of a line stays at the file's end."""
    with writing(path):
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
            raise


def require_writable(path: Path) -> None:
    """Raise ValueError if no file can be written at `path`, before a command works for it in vain."""
    folder = path.absolute().parent
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise ValueError(
            f"cannot write {path}: {folder} is " + ("a file" if folder.exists() else "missing: make that folder first")
        )
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {path}: {folder} cannot be written to")


def require_place(folder: Path) -> None:
    """Raise ValueError if `folder` neither is a folder that can be written to nor can be made."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder with --output")
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder} is a link to {folder.readlink()}, which is not there; name a folder with --output")
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        reason = "cannot be written to" if place.is_dir() else "is a file"
        raise ValueError(f"nothing can be kept in {folder}: {place} {reason}; name another folder with --output")


def require_run(folder: str | Path, *, finished: bool = False) -> None:
    """Raise ValueError if a folder has no run or, with `finished`, an unfinished one. Commands ask this before they
    import libraries that take seconds."""
    path = Path(folder).expanduser()
    if missing := [name for name in ("config.yaml", "elastic.json") if not (path / name).is_file()]:
        raise ValueError(f"{folder} is not a run folder (no {' and '.join(missing)} in it); elastic distill makes one")
    if finished and not (path / "routers.safetensors").exists():
        raise ValueError(f"{folder} is not finished: continue it with elastic distill --resume {quote(str(folder))}")
