"""Tell a data set's training files, folders and splits from the held-out ones by their names."""

from __future__ import annotations

import re
from pathlib import Path

TRAIN_NAMES = ("train", "training")
"""Names of the training part; files and folders may use any case and add a year or number."""
HELD_OUT_NAMES = ("val", "validation", "valid", "test", "testing", "dev")
"""Names of the held-out part, likewise; the first of these names that a data set has is used."""


def is_held_out(file: Path) -> bool:
    """Return whether a file belongs to the held-out part, by its path below the data's folder: by the innermost folder
    that has a part's name, else by the last whole word of the file's own name that is one (`latest` is none)."""
    names = (*TRAIN_NAMES, *HELD_OUT_NAMES)
    words = *re.findall(r"[a-z]+", file.stem.lower()), *(_without_number(folder) for folder in file.parent.parts)
    found = [word for word in words if word in names]
    return bool(found) and found[-1] in HELD_OUT_NAMES


def folders_of_parts(root: Path) -> tuple[Path | None, Path | None]:
    """Return the folders of the training and the held-out part in `root`, each None if it is missing."""
    folders = {_without_number(child.name): child for child in sorted(root.iterdir()) if child.is_dir()}
    train, held_out = (
        next((folders[name] for name in names if name in folders), None) for names in (TRAIN_NAMES, HELD_OUT_NAMES)
    )
    return train, held_out


def _without_number(folder: str) -> str:
    return re.sub(r"\d+$", "", folder.lower())
