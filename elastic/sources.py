"""What data a run may name as `data.source`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from elastic.settings import near
from elastic.traits import TRAITS
from teachers.data.records import is_path

NAMED_DATA = {"builtin": "llm", "fashion-mnist": "vit", "easy-vqa": "vlm"}
"""Values of `data.source` that are never taken as paths, even if the working directory has a file of that name, and the
family that each is for."""


def require_data(source: str, family: str) -> None:
    """Raise ValueError if `source` cannot be data for models of this family, before a model is loaded in vain."""
    path, traits = Path(source).expanduser(), TRAITS[family]
    if (other := NAMED_DATA.get(source, family)) != family:
        raise ValueError(f"{source} is data for {TRAITS[other].noun}, and this is {traits.noun}")
    if source in NAMED_DATA:
        return
    if path.exists() or path.is_symlink():
        traits.kinds.require(path)
    elif is_path(source) or not ("/" in source or traits.one_word):  # else it may be on the hub
        beside = [other.name for other in islice(path.parent.iterdir(), 1000)] if path.parent.is_dir() else []
        raise ValueError(
            f"no such file or folder: {source}{near(path.name, [*beside, *NAMED_DATA])}; --data takes one that exists"
        )
