"""A sweep folder: one line for every finished point, what was seen there, and the runs that were measured.

results.jsonl              a row of results for every point; of two rows for one point, the later counts
details/RUN/BUDGET.json    where compute went at that point (see elastic/accounting/routing.py)
runs/RUN                   run folders (see elastic/run.py)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from elastic.files import write_text

Row = dict[str, Any]
Key = tuple[str, float, str | None, str]


class SweepFolder:
    """A sweep folder on disk."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.results = self.folder / "results.jsonl"

    @classmethod
    def open(cls, folder: str | Path) -> SweepFolder:
        """An existing sweep folder; ValueError where it is none."""
        sweep = cls(folder)
        if not sweep.results.is_file():
            raise ValueError(f"{folder} is not a sweep folder (no results.jsonl in it); elastic sweep makes one")
        return sweep

    def rows(self) -> list[Row]:
        """The newest row of every point, in the order in which points were first finished.

        A last line that a kill cut short does not count; ValueError where another line is no row.
        """
        *lines, _ = self.results.read_text(encoding="utf-8").split("\n")
        newest: dict[Key, Row] = {}
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                newest[key_of(row)] = row
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"line {number} of {self.results} is no row of a sweep: remove it") from None
        return list(newest.values())

    def prepare(self) -> None:
        """Make the folder where there is none; where a kill cut the last line short, leave that out."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = self.results.read_text(encoding="utf-8") if self.results.exists() else ""
        whole, newline, _ = found.rpartition("\n")
        write_text(self.results, whole + newline)

    def append(self, row: Row) -> None:
        """Add a row, on disk when this returns."""
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def run(self, name: str) -> Path:
        """The run folder of this name."""
        return self.folder / "runs" / name

    def details(self, row: Row) -> Path:
        """Where the details of a row are, those of a baseline being its student's."""
        return self.folder / "details" / Path(row["run"]).name / f"{row['compute_target']:g}.json"


def key_of(row: Row) -> Key:
    """What makes a point: the run, the budget, the baseline if it is one, and the data measured on."""
    return row["run"], row["compute_target"], row["baseline"], row["data"]
