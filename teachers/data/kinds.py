"""The files and folders that `--data` takes in each family, looked at without torch, before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from teachers.data.records import RECORD_FILES, TEXT_FILES, visible


@dataclass(frozen=True)
class Kinds:
    """The files and folders that one family reads."""

    files: tuple[str, ...]
    """Endings of the files."""
    accepted: str
    """What `--data` takes, for messages."""
    inside: str | None = None
    """Pattern of the files of a folder, below it; None: the folder is looked at when it is read."""

    def found(self, folder: Path) -> Iterator[Path]:
        """Yield the files of these kinds in a folder, in no order, without hidden ones."""
        for file in folder.glob(self.inside or "*"):
            if file.suffix.lower() in self.files and visible(file, folder) and file.is_file():
                yield file

    def require(self, path: Path) -> None:
        """Raise ValueError if what exists at `path` cannot be read, is no file or folder, or is of another kind."""
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a link to {path.readlink()}, which is not there")
        if not path.is_dir() and not path.is_file():
            raise ValueError(f"{path} is neither a file nor a folder; {self.accepted}")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path} cannot be read: permission denied")
        if path.is_file() and path.suffix.lower() not in self.files:
            raise ValueError(f"unknown kind of file: {path}; {self.accepted}")
        if path.is_dir() and self.inside and next(self.found(path), None) is None:
            raise ValueError(f"no {', '.join(self.files)} file in folder {path}; {self.accepted}")


TEXT = Kinds(
    (*TEXT_FILES, *RECORD_FILES),
    "--data takes a .txt, .md, .jsonl, .json or .parquet file, a folder of such files, a hub data set (org/name or "
    "org/name:config), or builtin",
    inside="**/*",
)
IMAGES = Kinds(
    (".parquet",),
    "--data takes a folder with train/ and val/ or class sub-folders, a parquet file or folder of them, fashion-mnist, "
    "or a hub data set (name or org/name)",
)
QUESTIONS = Kinds(
    RECORD_FILES,
    "--data takes a .jsonl, .json or .parquet file of image, question and answer (or LLaVA's conversations), a folder "
    "of such files, easy-vqa, or a hub data set (org/name)",
    inside="*",
)
