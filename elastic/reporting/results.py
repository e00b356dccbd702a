"""Sweep folders: one line of results per finished point, the routing profiles, and the measured runs.

results.jsonl              a row of results per point; of two rows for the same point, the later counts
failures.jsonl             why points failed, as lists of a point's key and the reason
details/RUN/BUDGET.json    the routing profile at that point (see elastic/accounting/routing.py)
runs/RUN                   run folders (see elastic/run.py)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic.files import append_line, write_text

Row = dict[str, Any]
Key = tuple[str, float, str | None, str]

KINDS: dict[str, Any] = {
    **dict.fromkeys(("run", "data", "model", "preset", "phase", "trained_for", "command", "measured_at"), str),
    **dict.fromkeys(("compute", "compute_target"), int | float),
    **dict.fromkeys(("versions", "machine"), dict),
    **{"baseline": str | None, "seed": int, "metrics": list, "bench": list | None},
    **{"train_seconds": int | float | None, "train_steps": int | None},
}
"""Entries that every row has, and the kind of their values."""
TIMINGS: dict[str, Any] = {
    "phase": str,
    **dict.fromkeys(("batch", "tokens", "predicted_speedup", "measured_speedup", "seconds"), int | float),
}
"""Entries of each row of timings in `bench`."""


class SweepFolder:
    """A sweep folder on disk."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.results = self.folder / "results.jsonl"
        self._failures = self.folder / "failures.jsonl"

    @classmethod
    def open(cls, folder: str | Path) -> SweepFolder:
        """Open an existing sweep folder; ValueError if the folder has no results.jsonl."""
        sweep = cls(folder)
        if not sweep.results.is_file():
            raise ValueError(f"{folder} is not a sweep folder (no results.jsonl in it); elastic sweep makes one")
        return sweep

    def rows(self) -> list[Row]:
        """Return the newest row of every point, in the order in which points were first finished.

        A last line without its newline, cut short by a kill, is ignored; ValueError if another line is not a row.
        """
        *lines, _ = self.results.read_text(encoding="utf-8", errors="replace").split("\n")
        newest: dict[Key, Row] = {}
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not _is_row(row):
                raise ValueError(f"line {number} of {self.results} is no row of a sweep: remove it")
            newest[key_of(row)] = row
        return list(newest.values())

    def prepare(self) -> None:
        """Create the folder if necessary, and remove a last line of results.jsonl that a kill cut short."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = self.results.read_text(encoding="utf-8", errors="replace") if self.results.exists() else ""
        whole, newline, cut = found.rpartition("\n")
        if cut or not self.results.exists():  # else another sweep may be adding a row just now
            write_text(self.results, whole + newline)

    def append(self, row: Row) -> None:
        """Append a row to results.jsonl and sync the file to disk."""
        append_line(self.results, json.dumps(row), sync=True)

    def fail(self, keys: Sequence[Key], reason: str) -> None:
        """Record why these points failed."""
        before = self._failures.read_text(encoding="utf-8") if self._failures.exists() else ""
        write_text(self._failures, before + "".join(json.dumps([*key, reason]) + "\n" for key in keys))

    def failures(self) -> dict[Key, str]:
        """Return the newest reason of every point that has failed and has no row."""
        lines = self._failures.read_text(encoding="utf-8").splitlines() if self._failures.exists() else ()
        try:
            reasons = {(run, budget, kind, data): why for run, budget, kind, data, why in map(json.loads, lines)}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self._failures} is damaged ({error}): delete it") from None
        made = {key_of(row) for row in self.rows()}
        return {key: reason for key, reason in reasons.items() if key not in made}

    def run(self, name: str) -> Path:
        """Return the path of the run folder with this name."""
        return self.folder / "runs" / name

    def details(self, row: Row) -> Path:
        """Return the path of a row's routing profile; a baseline's row has the path of its student's profile."""
        return self.folder / "details" / Path(row["run"]).name / f"{row['compute_target']:g}.json"


def _is_row(row: Any) -> bool:
    """Return whether something is a row, with all that reports read of it."""
    if not _has(row, KINDS) or not all(_has(part, TIMINGS) for part in row["bench"] or ()):
        return False
    metrics = row["metrics"]
    named = all(isinstance(metric, list) and [*map(type, metric)] == [str, str, str] for metric in metrics)
    return named and _has(row, dict.fromkeys((name for name, *_ in metrics), int | float))


def _has(part: Any, kinds: dict[str, Any]) -> bool:
    """Return whether something is a dictionary with these entries of these kinds."""
    return isinstance(part, dict) and all(name in part and isinstance(part[name], kinds[name]) for name in kinds)


def key_of(row: Row) -> Key:
    """Return what identifies a row's point: the run, the budget, the baseline (None for a student) and the data."""
    return row["run"], row["compute_target"], row["baseline"], row["data"]
