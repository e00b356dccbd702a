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

NEEDED = {"model", "preset", "compute", "metrics", "bench", "versions", "machine"}
"""Keys that every row has, besides those of its point."""


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
                newest[key_of(row)] = row
                numbers = "compute", "compute_target", *(name for name, *_ in row["metrics"])
                whole = row.keys() >= NEEDED and all(isinstance(row[name], int | float) for name in numbers)
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise ValueError(f"line {number} of {self.results} is no row of a sweep: remove it")
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
            reasons = {tuple(key): reason for *key, reason in map(json.loads, lines)}
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


def key_of(row: Row) -> Key:
    """Return what identifies a row's point: the run, the budget, the baseline (None for a student) and the data."""
    return row["run"], row["compute_target"], row["baseline"], row["data"]
