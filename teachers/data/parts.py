"""Which files, folders and splits of a data set are trained on, and which are held out, by what they are called."""

from __future__ import annotations

import re
from pathlib import Path

TRAIN_NAMES = ("train", "training")
"""What the part that is trained on may be called, whatever the case, and with a year or number behind it."""
HELD_OUT_NAMES = ("val", "validation", "valid", "test", "testing", "dev")
"""The same of the part that is not; the first of these that there is, is taken."""


def is_held_out(stem: str) -> bool:
    """Whether a file of this name, without its ending, is of the held-out part: the last whole word that names a part
    counts (`latest`, `interval` and `contest` name none)."""
    words = [word for word in re.findall(r"[a-z]+", stem.lower()) if word in (*TRAIN_NAMES, *HELD_OUT_NAMES)]
    return bool(words) and words[-1] in HELD_OUT_NAMES


def folders_of_parts(root: Path) -> tuple[Path | None, Path | None]:
    """The folders of the two parts in `root`, each None where there is none."""
    folders = {re.sub(r"\d+$", "", child.name.lower()): child for child in sorted(root.iterdir()) if child.is_dir()}
    train, held_out = (
        next((folders[name] for name in names if name in folders), None) for names in (TRAIN_NAMES, HELD_OUT_NAMES)
    )
    return train, held_out
