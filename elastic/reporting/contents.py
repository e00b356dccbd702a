"""Contents of a report: plots, tables and examples of each model, and the origin of every number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from markupsafe import Markup

from elastic.reporting import plots
from elastic.reporting.results import Row, SweepFolder

LEVELS = 10
"""Number of shades in which a report shows the compute of a text's tokens."""
ALONE = 3
"""Maximum number of metrics in the plot that is written as a file of its own (for a README)."""
Details = dict[str, Any]


@dataclass
class Series:
    """The rows of one line of a plot: one preset, or one baseline of a preset, at all its budgets and seeds."""

    rows: list[Row]
    label: str = ""
    style: int = 0
    budgets: list[float] = field(default_factory=list)
    """Target compute of the rows, descending, each value once."""

    @property
    def baseline(self) -> bool:
        """Whether the rows are of a baseline instead of a trained student."""
        return self.rows[0]["baseline"] is not None

    def at(self, budget: float) -> list[Row]:
        """Return the rows at a budget, one per seed."""
        return [row for row in self.rows if row["compute_target"] == budget]

    def first(self) -> list[Row]:
        """Return the rows of the smallest seed, by descending budget."""
        seed = min(row["seed"] for row in self.rows)
        return sorted((r for r in self.rows if r["seed"] == seed), key=lambda r: -r["compute_target"])


@dataclass
class Table:
    """A table with cells as text, for HTML and Markdown."""

    caption: str
    header: list[str]
    rows: list[list[str]]


class Model:
    """The part of a report about one model: its plots, tables, examples and similarities."""

    def __init__(self, name: str, rows: list[Row]) -> None:
        self.name = name
        self.title = Path(name).name
        self.rows = rows
        self.metrics = list(dict.fromkeys(tuple(metric) for row in rows for metric in row["metrics"]))
        self.series = _series(rows)
        self.students = [series for series in self.series if not series.baseline]
        self.axis = "compute, share of the teacher's"
        phases = {row["phase"] for row in rows}
        if len(phases) == 1 and any("compute_prefill" in row for row in rows):  # rows also have another phase
            self.axis = f"compute in {phases.pop()}, share of the teacher's"

    def quality_panels(self) -> list[plots.Panel]:
        """Return one panel per metric, plotted against measured compute."""
        panels = []
        for key, label, better in self.metrics:
            teachers = {round(row[f"teacher_{key}"], 6) for row in self.rows if f"teacher_{key}" in row}
            level = (teachers.pop(), "teacher") if len(teachers) == 1 else None
            pairs = [
                [[(spent(row), row[key]) for row in s.at(b) if key in row] for b in s.budgets] for s in self.series
            ]
            lines = _lines(self.series, pairs)
            linear = better == "higher"  # metrics of which higher is better are shares
            panels.append(plots.Panel(label, self.axis, f"{better} is better", lines, level, linear=linear))
        return panels

    def quality_plot(self) -> str:
        """Return an SVG file with the first ALONE metrics side by side."""
        return plots.curves(self.quality_panels()[:ALONE], f"Quality of {self.title} against compute", alone=True)

    def quality_plots(self) -> list[Markup]:
        """Return one SVG element per metric, for an HTML page."""
        return [
            Markup(
                plots.curves([panel], f"{self.title}: {panel.title} against compute; the table below has the numbers")
            )
            for panel in self.quality_panels()
        ]

    def speed_plots(self) -> list[Markup]:
        """Return one SVG element per way of running the model (see `ways`): measured against predicted speed-up."""
        drawn = []
        for way in self.ways():
            pairs = [
                [[pair for row in s.at(b) for pair in speed_ups(row, way)] for b in s.budgets] for s in self.students
            ]
            lines = _lines(self.students, pairs)
            panel = plots.Panel(way, "speed-up predicted from FLOPs", "measured", lines, diagonal="as predicted")
            alt = f"{self.title}: measured against predicted speed-up, {way}; the table below has the numbers"
            drawn.append(Markup(plots.curves([panel], alt)))
        return drawn

    def ways(self) -> list[str]:
        """Return the names of all timed passes, such as "decode, batch 1, 128 tokens", in order of appearance."""
        return list(dict.fromkeys(way for row in self.rows for way in benched(row)))

    def quality_table(self) -> Table:
        """Return the table of quality and compute at every budget, as means over seeds."""
        seeds = max(len(series.at(b)) for series in self.series for b in series.budgets)
        header = [
            "preset or baseline",
            "asked",
            "compute",
            *(label for _, label, _ in self.metrics),
            *(["seeds"] if seeds > 1 else []),
        ]
        rows = []
        for series in self.series:
            for budget in series.budgets:
                at = series.at(budget)
                cells = [series.label, f"{budget:g}", _spread([spent(row) for row in at], "{:.3f}")]
                cells += [_spread([row[key] for row in at if key in row]) for key, _, _ in self.metrics]
                rows.append(cells + ([str(len(at))] if seeds > 1 else []))
        caption = "Quality at every budget" + (
            "; of several seeds the mean, and how far the furthest is from it" if seeds > 1 else ""
        )
        return Table(caption, header, rows)

    def speed_table(self) -> Table:
        """Return the table of predicted and measured speed-ups at every budget, as means over seeds."""
        rows = []
        for series in self.students:
            for budget in series.budgets:
                for way in self.ways():
                    pairs = [pair for row in series.at(budget) for pair in speed_ups(row, way)]
                    if pairs:
                        predicted, measured = ([pair[n] for pair in pairs] for n in (0, 1))
                        ratio = mean(measured) / mean(predicted)
                        speeds = (_spread(values, "{:.2f}x") for values in (predicted, measured))
                        rows.append([series.label, f"{budget:g}", way, *speeds, f"{ratio:.2f}"])
        return Table(
            "Speed over the dense model",
            ["preset", "asked", "how", "predicted", "measured", "measured / predicted"],
            rows,
        )

    def heat_maps(self) -> list[tuple[str, Markup, str, Table]]:
        """Return (label, plot, compute outside of the blocks as text, table) per preset: the compute of every layer's
        branches at every budget."""
        maps = []
        for series in self.students:
            found = [(row, details) for row in series.first() if (details := details_of(row))]
            if not found:
                continue
            names = found[0][1]["branches"]
            budgets = [f"{row['compute_target']:g}" for row, _ in found]
            shares = np.array([details["blocks"] for _, details in found])
            alt = (
                f"{self.title}, {series.label}: compute of every layer's {' and '.join(names)} at the budgets "
                f"{', '.join(budgets)}; the table below has the numbers"
            )
            header = ["layer", *(f"{name} at {budget}" for budget in budgets for name in names)]
            cells = [
                [str(layer), *(f"{shares[b, layer, n]:.2f}" for b in range(len(budgets)) for n in range(len(names)))]
                for layer in range(shares.shape[1])
            ]
            outside = "; ".join(
                f"{name}: "
                + ", ".join(f"{details['outside'][name]:.2f} at {row['compute_target']:g}" for row, details in found)
                for name in found[0][1]["outside"]
            )
            table = Table(f"Compute of every layer, {series.label}", header, cells)
            maps.append((series.label, Markup(plots.heat(names, budgets, shares, alt)), outside, table))
        return maps

    def examples(self, room: int) -> list[dict[str, Any]]:
        """Return every preset's examples at every budget.

        Presets share `room` bytes of the page in order; a preset whose examples do not fit has an empty list.
        """
        shown = []
        for series in self.students:
            found = [(row, details["examples"]) for row in series.first() if (details := details_of(row))]
            found = [(row, examples) for row, examples in found if examples]
            if not found:
                continue
            every = [example for _, examples in found for example in examples]
            size = sum(map(_size, every))
            fits = size <= room
            room -= size * fits
            shares = [share for example in every for _, share in example.get("pieces", ())]
            low, high = np.percentile(shares, [5, 95]) if shares else (0.0, 1.0)
            budgets = [
                {"budget": f"{row['compute_target']:g}", "examples": [_shaded(e, low, high) for e in examples]}
                for row, examples in found
                if fits
            ]
            shown.append({"label": series.label, "low": low, "high": high, "text": bool(shares), "budgets": budgets})
        return shown

    def similarities(self) -> list[tuple[str, list[str], list[list[float | None]]]]:
        """Return (title, names, matrix of rank correlations) for all runs at each budget, and for the budgets of each
        preset; groups with fewer than two members are left out."""
        groups: list[tuple[str, list[tuple[str, Row]]]] = []
        for budget in sorted({row["compute_target"] for row in self.rows}, reverse=True):
            at = [(f"{s.label}, seed {row['seed']}", row) for s in self.students for row in s.at(budget)]
            groups.append((f"runs at {budget:g}", at))
        for series in self.students:
            groups.append((f"budgets of {series.label}", [(f"{r['compute_target']:g}", r) for r in series.first()]))
        found = []
        for title, members in groups:
            known = [(name, ranked(details)) for name, row in members if (details := details_of(row))]
            if len(known) > 1:
                every = [ranks for _, ranks in known]
                found.append(
                    (title, [name for name, _ in known], [[rank_correlation(a, b) for b in every] for a in every])
                )
        return found


class Origins:
    """Origins of rows: the commands (C1, C2, ...) and environments (E1, E2, ...) that made them, each listed once; and
    the points that failed."""

    def __init__(self, rows: list[Row], sweeps: Sequence[SweepFolder]) -> None:
        self.rows = rows
        failed = [(sweep.folder, *point) for sweep in sweeps for point in sweep.failures().items()]
        self.failures = [
            (f"{folder / run} at {budget:g}" + (f", {baseline} (baseline)" if baseline else ""), reason)
            for folder, (run, budget, baseline, _), reason in failed
        ]
        self.commands = list(dict.fromkeys(row["command"] for row in rows))
        self.surroundings = list(dict.fromkeys(_surroundings(row) for row in rows))

    def runs(self) -> list[dict[str, str]]:
        """Return the path, configuration and training time of every run folder."""
        runs = {}
        for row in self.rows:
            path = row["folder"].folder / row["run"]
            if path not in runs:
                file = path / "config.yaml"
                config = file.read_text(encoding="utf-8") if file.is_file() else "(the run folder is gone)"
                took = f"{row['train_steps']} steps"
                if row["train_seconds"] is not None:
                    took += f", {row['train_seconds'] / 60:.1f} min"
                runs[path] = {"path": str(path), "config": config, "took": took}
        return list(runs.values())

    def table(self) -> Table:
        """Return the table of every row with its data, time of measurement, command and environment."""
        header = ["run", "seed", "baseline", "asked", "measured on", "measured at", "command", "surroundings"]
        cells = []
        for row in self.rows:
            measured = f"{row['compute_target']:g}", row["data"], row["measured_at"]
            names = (
                f"C{self.commands.index(row['command']) + 1}",
                f"E{self.surroundings.index(_surroundings(row)) + 1}",
            )
            path = str(row["folder"].folder / row["run"])
            cells.append([path, str(row["seed"]), row["baseline"] or "", *measured, *names])
        return Table("Every row and what it was made by", header, cells)


def _surroundings(row: Row) -> str:
    """Return a row's machine and library versions as one line of text."""
    parts = [*row["machine"].items(), *row["versions"].items()]
    return ", ".join(f"{name} {value}" for name, value in parts)


def _series(rows: list[Row]) -> list[Series]:
    """Group rows into lines of a plot, students before baselines; a label names every property that varies."""
    found: dict[tuple, Series] = {}
    for row in rows:
        each = "one checkpoint" if ":" in row["trained_for"] else "a run per budget"
        parts = (row["preset"], each, row["phase"], row["data"], str(row["folder"].folder))
        found.setdefault((row["baseline"], *parts), Series([])).rows.append(row)
    ordered = sorted(found.items(), key=lambda item: item[0][0] is not None)
    varies = [len({key[n] for key in found}) > 1 for n in range(6)]
    for style, (key, series) in enumerate(ordered):
        more = [part for part, shown in zip(key[2:], varies[2:], strict=True) if shown]
        of = f" of {key[1]}" if varies[1] else ""
        series.label = ", ".join([key[1] if key[0] is None else f"{key[0]} (baseline{of})", *more])
        series.style = style
        series.budgets = sorted({row["compute_target"] for row in series.rows}, reverse=True)
    return [series for _, series in ordered]


def _lines(series: Sequence[Series], pairs: Sequence[list[list[tuple[float, float]]]]) -> list[plots.Line]:
    """Return a line for each series with at least one pair: at each budget the mean x and y, and the smallest and
    largest y; pairs: for each series a list, per budget, of (x, y) of its seeds."""
    lines = []
    for one, budgets in zip(series, pairs, strict=True):
        columns = [[list(column) for column in zip(*at, strict=True)] for at in budgets if at]
        points = sorted((mean(x), mean(y), min(y), max(y)) for x, y in columns)
        if points:
            x, y, low, high = (list(column) for column in zip(*points, strict=True))
            lines.append(plots.Line(one.label, x, y, low, high, style=one.style, dashed=one.baseline))
    return lines


def spent(row: Row) -> float:
    """Return a row's measured compute in the phase of its budget."""
    key = f"compute_{row['phase']}"
    return float(row[key] if key in row else row["compute"])


def benched(row: Row) -> dict[str, dict[str, Any]]:
    """Return a row's timings of inference by phase and sizes, such as "decode, batch 1, 128 tokens"."""
    parts = [part for part in row["bench"] or () if part["phase"] != "train"]
    return {f"{part['phase']}, batch {part['batch']}, {part['tokens']} tokens": part for part in parts}


def speed_ups(row: Row, way: str) -> list[tuple[float, float]]:
    """Return [(predicted, measured) speed-up] of a row's pass named `way`; an empty list if it was not timed."""
    part = benched(row).get(way)
    return [] if part is None else [(part["predicted_speedup"], part["measured_speedup"])]


def details_of(row: Row) -> Details | None:
    """Return the routing profile saved for a row's point (see elastic/accounting/routing.py); None if there is none, as
    at compute 1.0, where nothing is routed. ValueError if its file is damaged."""
    path = row["folder"].details(row)
    if not path.is_file():
        return None
    try:
        details: Details = json.loads(path.read_text(encoding="utf-8"))
        if any(len(block) != len(details["branches"]) for block in details["blocks"]):
            raise ValueError("its blocks have not all of its branches")
        if missing := {"sample", "outside", "tokens", "examples"} - details.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return details
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and the report does without") from None


def ranked(details: Details) -> tuple[str, np.ndarray]:
    """Return (fingerprint of the input, ranks [layers, tokens]), each layer's ranks centred and of length 1.

    Tokens are ranked by the share of the layer's gates that is open to the token; ties share their mean rank. The
    scaling makes the dot product of two layers' ranks their correlation. A layer that treats all tokens alike is NaN.
    """
    ranks = np.array([_ranks(values) for values in details["tokens"]])
    ranks = ranks - ranks.mean(1, keepdims=True)
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    return details["sample"], np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0)


def rank_correlation(first: tuple[str, np.ndarray], second: tuple[str, np.ndarray]) -> float | None:
    """Return Spearman's rank correlation over tokens of two students' routing (see `ranked`), as the mean over the
    layers in which both students distinguish tokens.

    None if there is no such layer, or if the two did not see the same input.
    """
    if first[0] != second[0] or first[1].shape != second[1].shape:
        return None
    found = (first[1] * second[1]).sum(1)
    found = found[~np.isnan(found)]
    return float(found.mean()) if len(found) else None


def _ranks(values: Sequence[int]) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def _size(example: dict[str, Any]) -> int:
    """Return about how many bytes of an HTML page an example takes."""
    return len(example.get("image", "")) + sum(40 + len(text) for text, _ in example.get("pieces", ()))


def _shaded(example: dict[str, Any], low: float, high: float) -> dict[str, Any]:
    """Return an example whose pieces are (text, shade from 0 to LEVELS - 1, compute as text); shares of compute from
    low to high are spread over the shades."""

    def shade(share: float) -> int:
        return int(min(LEVELS - 1, max(0, LEVELS * (share - low) / max(high - low, 1e-9))))

    return {**example, "pieces": [(text, shade(share), f"{share:.2f}") for text, share in example.get("pieces", ())]}


def _spread(values: Sequence[float], form: str = "") -> str:
    """Return the mean as text, with several values followed by ± the largest deviation; "" without values."""
    if not values:
        return ""
    middle = mean(values)
    form = form or ("{:.4f}" if abs(middle) < 10 else "{:,.1f}")
    away = max(abs(value - middle) for value in values)
    return form.format(middle) + (f" ± {form.format(away)}" if len(values) > 1 else "")
