"""Names and paths behind --tasks, looked at before the harness is imported, which alone takes seconds."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

_NAMED = re.compile(rb"^(?:task|group|tag): *['\"]?([\w.+-]+)", re.MULTILINE)


def path_of(item: str) -> Path | None:
    """Return the path of an item that is a file of questions, None for the name of a task."""
    path = Path(item).expanduser()
    return path if path.is_file() or path.suffix or len(path.parts) > 1 else None


def require_known(items: Sequence[str]) -> None:
    """Raise ValueError for a missing file of questions, or a name that is nowhere in the harness's task files, whose
    list by the harness takes far longer."""
    names = []
    for item in items:
        path = path_of(item)
        if path is None:
            names.append(item)
        elif not path.is_file():
            raise ValueError(f"no such file of questions: {path}")
    found = find_spec("lm_eval") if names else None
    if found is None or found.origin is None:
        return
    files = (file for file in Path(found.origin).parent.glob("tasks/**/*") if file.is_file())
    texts = b"\n".join(file.read_bytes() for file in files if file.suffix not in (".py", ".pyc"))
    for name in names:
        if texts and name.encode() not in texts:
            raise unknown(name, {known.decode() for known in _NAMED.findall(texts)})


def unknown(name: str, known: Collection[str]) -> ValueError:
    """Return the error for a name that the harness does not know, with the nearest of those that it knows."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return ValueError(f"the harness has no task {name!r}: {hint}`lm-eval ls tasks` lists them; files go by path")
