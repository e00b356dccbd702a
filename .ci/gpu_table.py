"""Print results of `elastic bench --json`, in files NUMBER-NAME.json, as one Markdown table for the README, and behind
it what NUMBER-NAME.txt says of those that are missing.

The column "of predicted" is the measured over the predicted speed-up, measured against the tuned dense model or, if
there is none, against the dense model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "shape, student, compute asked",
    "work",
    "FLOPs",
    "bytes",
    "predicted",
    "dense",
    "tuned",
    "student",
    "over dense",
    "over tuned",
    "over ToMe",
    "of predicted",
    "peak",
)
FEWEST = 8
"""Fewest new tokens for a row of decoding: with fewer, noise in the prompt's time would hide theirs."""


def lines(files: Sequence[Path]) -> list[str]:
    """Return a line about the machine and the table's lines, in the order of the files' numbers, and a line for each
    command that timed nothing."""
    files = sorted(files, key=_number)
    found = [(file, json.loads(file.read_text().splitlines()[-1])) for file in files if file.suffix == ".json"]
    missing = [line for file in files if file.suffix == ".txt" for line in ("", file.read_text().strip())]
    if not found:
        return ["nothing was timed", *missing]
    first = found[0][1]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("torch", "transformers", "elastic-distill"))
    device = first["machine"].get("device", first["machine"]["processor"])
    out = [f"{device}; {versions}; {first['rows'][0]['dtype']}; {first['date']}", ""]
    out += [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    for file, made in found:
        name = file.stem.partition("-")[2].replace(",", ", ")
        shape = made["timed"].partition(",")[0]
        out += [
            _line(_cells(shape, name, row))
            for row in made["rows"]
            if row["phase"] != "decode" or row["tokens"] >= FEWEST
        ]
    for file, made in found:
        if "replaced_kernels" in made["machine"]:
            out += ["", f"{file.stem}: torch's operators in place of {made['machine']['replaced_kernels']}"]
    return [*out, *missing]


def _number(file: Path) -> int:
    return int(file.stem.partition("-")[0])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(shape: str, name: str, row: dict[str, Any]) -> list[str]:
    by_bytes = row.get("predicted_speedup_bytes")
    share = "" if by_bytes is None else f"{1 / by_bytes:.3f}"
    # decoding is limited by memory bandwidth, everything else by arithmetic
    ratio = by_bytes if row["phase"] == "decode" else row["predicted_speedup"]
    reached = row.get("tuned_speedup", row["measured_speedup"]) / ratio
    if row["phase"] == "train":
        predicted = f"{row['ideal_teacher_forwards']:.2f} forwards"
        over = [f"{row['teacher_forwards']:.2f} forwards", "", ""]
    else:
        predicted = f"{ratio:.2f}x"
        over = [
            f"{row[key]:.2f}x" if key in row else "" for key in ("measured_speedup", "tuned_speedup", "tome_speedup")
        ]
    times = (f"{1000 * row[key]:.2f} ms" if key in row else "" for key in ("dense_seconds", "tuned_seconds", "seconds"))
    what = f"{shape}, {name}, {row['compute_target']:g}", f"{row['phase']} {row['batch']} x {row['tokens']}"
    spent, peak = f"{row['compute']:.3f}", f"{row['peak_bytes'] / 1e9:.1f} GB"
    return [*what, spent, share, predicted, *times, *over, f"{reached:.2f}", peak]


if __name__ == "__main__":
    print("\n".join(lines([Path(name) for name in sys.argv[1:] if Path(name).exists()])))
