"""Plots as SVG: text stays text, and colours are CSS properties of the page, so that they follow its dark mode."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

INK, FAINT = "#00f0f0", "#00f0f1"
SERIES = [f"#00f0a{n}" for n in range(8)]
"""Placeholder colours that matplotlib draws with; `_svg` replaces each by a CSS property (see PROPERTIES)."""
PROPERTIES = {INK: "currentColor", FAINT: "var(--faint)"}
PROPERTIES |= {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)}
LIGHT = ["#0067b9", "#c8460e", "#00805a", "#a83d8b", "#8a6500", "#2e8bc0", "#6a51c9", "#5f6b76"]
DARK = ["#58a9f0", "#ff8f5c", "#3cc996", "#e48fcf", "#dfb13f", "#86cdf5", "#b0a0ff", "#a9b4bf"]
"""Colours of the series on light pages (LIGHT) and on dark pages (DARK)."""
MARKERS = "osD^vPX*"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "elastic",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}


@dataclass(frozen=True)
class Line:
    """One line of a plot, with points in ascending order of x."""

    label: str
    x: list[float]
    y: list[float]
    low: list[float]
    """Smallest y over seeds at each x."""
    high: list[float]
    """Largest y over seeds at each x."""
    style: int
    """Number of the line's colour and marker; the same in all plots of a page."""
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes with its lines."""

    title: str
    x: str
    y: str
    lines: list[Line]
    level: tuple[float, str] | None = None
    """Height and label of a horizontal line; None for no line."""
    diagonal: str = ""
    """Label of a line y = x; empty for no line."""
    linear: bool = False
    """Whether the y axis is always linear, for values such as accuracies, which lie between 0 and 1."""


def curves(panels: Sequence[Panel], alt: str, *, alone: bool = False) -> str:
    """Return an SVG of panels side by side with one legend below; alone: as a complete file instead of an element of an
    HTML page; alt: the plot in words."""
    with matplotlib.rc_context(STYLE):
        labels = {line.label for panel in panels for line in panel.lines}
        width = (4.3 if len(panels) == 1 else 3.9) * len(panels)
        columns = max(1, min(4, len(labels), int(14 * width / (max(map(len, labels), default=0) + 8))))
        figure = Figure(figsize=(width, 2.8 + 0.2 * -(-len(labels) // columns)))
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        handles: dict[str, Any] = {}
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _axes(axes, panel, handles)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=9)
        return _svg(figure, alt, alone)


def _axes(axes: matplotlib.axes.Axes, panel: Panel, handles: dict[str, Any]) -> None:
    axes.set(xlabel=panel.x, ylabel=panel.y)
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", pad=9)
    axes.patch.set_alpha(0)
    for line in panel.lines:
        colour, marker = SERIES[line.style % len(SERIES)], MARKERS[line.style % len(MARKERS)]
        face = "none" if line.dashed else colour
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markerfacecolor": face,
            "linestyle": "--" if line.dashed else "-",
        }
        (handles[line.label],) = axes.plot(line.x, line.y, **style)
        if line.low != line.high:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
            around = np.abs(np.array([line.low, line.high]) - line.y)
            axes.errorbar(line.x, line.y, around, fmt="none", ecolor=colour, elinewidth=1, capsize=2.5)
    _scale(axes, [y for line in panel.lines for y in line.y], panel.linear)
    if panel.level is not None:
        level, text = panel.level
        axes.axhline(level, color=INK, linewidth=1, linestyle=":")
        place: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(text, (1, level), (3, 0), **place, size=9, va="center")  # behind the line's end, where nothing is
    if panel.diagonal:
        ends = [v for line in panel.lines for v in (*line.x, *line.y)]
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=INK, linewidth=1, linestyle=":")
        axes.annotate(panel.diagonal, (max(ends), max(ends)), (-4, 2), textcoords="offset points", size=9, ha="right")


def _scale(axes: matplotlib.axes.Axes, values: Sequence[float], linear: bool) -> None:
    """Make the y axis logarithmic if the values span more than a factor of 20 and none is negative (symmetric
    logarithmic if there are zeros); otherwise, or with `linear`, linear."""
    positive = [value for value in values if value > 0]
    if linear or not positive or min(values) < 0 or max(positive) <= 20 * min(positive):
        axes.yaxis.set_major_locator(MaxNLocator(6))
        return
    if min(values) > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=min(positive), linscale=0.5)
        decades = range(math.ceil(math.log10(min(positive))), math.floor(math.log10(max(positive))) + 1)
        axes.set_yticks([0, *(10**n for n in decades)])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def heat(names: Sequence[str], budgets: Sequence[str], shares: np.ndarray, alt: str) -> str:
    """Return an SVG with one heat map (budgets by layers) per branch, one below the other, of shares of the teacher's
    compute [budgets, layers, branches]; names: the branches' names; alt: the plot in words."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        rows = len(names)
        figure = Figure(figsize=(4.3, rows * (0.55 + 0.2 * len(budgets)) + 0.9), layout="constrained")
        every = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        top = max(1.0, float(shares.max()))
        for axes, name, values in zip(every, names, np.moveaxis(shares, 2, 0), strict=True):
            edges = np.arange(values.shape[1] + 1) - 0.5, np.arange(len(budgets) + 1) - 0.5
            mesh = axes.pcolormesh(*edges, values, vmin=0, vmax=top, cmap="viridis", rasterized=True)
            axes.set(yticks=range(len(budgets)), yticklabels=budgets, ylabel="budget")
            axes.set_title(name, loc="left", fontsize=10)
            axes.invert_yaxis()
            axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        every[-1].set_xlabel("layer")
        bar = figure.colorbar(mesh, ax=list(every), location="bottom", aspect=40, shrink=0.9)
        bar.set_label("compute, share of the teacher's in that place")
        bar.outline.set_visible(False)
        return _svg(figure, alt)


def _svg(figure: Figure, alt: str, alone: bool = False) -> str:
    """Return a figure as an SVG element with ids unique in the page, the page's fonts and colours, and `alt` as its
    label; alone: as a complete file with its own style sheet and title."""
    file = io.StringIO()
    figure.patch.set_alpha(0)
    figure.savefig(file, format="svg", dpi=200, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    prefix = f"p{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    for colour, value in PROPERTIES.items():
        text = text.replace(colour, value)
    label = f'role="img" aria-label="{escape(alt)}" stroke-linejoin="round"'
    if not alone:
        return text.replace("<svg ", f"<svg {label} ", 1)
    style = f"{palette()} :root {{ background: var(--page) }} text {{ font-family: system-ui, sans-serif }}"
    text = text.replace(">", f"><title>{escape(alt)}</title><style>{style}</style>", 1)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + text.replace("<svg ", f"<svg {label} ", 1)


def palette() -> str:
    """Return CSS rules that define the plots' colour properties for a page, in light and in dark mode."""

    def rule(page: str, ink: str, faint: str, series: Sequence[str]) -> str:
        colours = "".join(f"--series-{number}: {colour}; " for number, colour in enumerate(series))
        return f":root {{ --page: {page}; color: {ink}; --faint: {faint}; {colours}}}"

    light, dark = rule("#ffffff", "#1c2127", "#d9dee4", LIGHT), rule("#12161b", "#e4e8ec", "#343c46", DARK)
    return f"{light} @media (prefers-color-scheme: dark) {{ {dark} }}"
