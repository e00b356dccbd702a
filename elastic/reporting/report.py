"""Reports on sweeps: a self-contained HTML page, and its tables and plots as files, made from result rows alone.

Nothing here imports torch.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from elastic.files import require_writable, write_text
from elastic.reporting import plots
from elastic.reporting.contents import LEVELS, Model, Origins, Table, benched
from elastic.reporting.results import Row, SweepFolder

EXAMPLE_BYTES = 1_200_000
"""Maximum size in bytes of the examples on a page, divided evenly among its models."""


def report(folders: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Write an HTML page about sweep folders and, beside it, .md and .csv files and an SVG plot per model.

    Returns the paths written. ValueError if `output` does not end in .html or cannot be written, if a folder is not a
    sweep folder, or if no point is finished in any of the folders.
    """
    page = Path(output)
    if page.suffix != ".html":
        raise ValueError(f"--output is {output}; it is a page, and ends in .html")
    require_writable(page)
    places = [os.path.realpath(folder) for folder in folders]
    sweeps = [SweepFolder.open(folder) for n, folder in enumerate(folders) if places[n] not in places[:n]]
    rows = [{**row, "folder": sweep} for sweep in sweeps for row in sweep.rows()]
    if not rows:
        raise ValueError(f"no point is finished yet in {', '.join(map(str, folders))}")
    models = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        models[name] = Model(name, [row for row in rows if row["model"] == name])
    origins = Origins(rows, sweeps)
    written = {page: _page(list(models.values()), origins)}
    images = {name: page.with_name(f"{page.stem}-{model.title}.svg") for name, model in models.items()}
    written |= {images[name]: model.quality_plot() for name, model in models.items()}
    written[page.with_suffix(".md")] = _markdown(list(models.values()), origins, images)
    written[page.with_suffix(".csv")] = _csv(rows)
    for path, text in written.items():
        write_text(path, text)
    return list(written)


def _page(models: list[Model], origins: Origins) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("elastic.reporting").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        models=models,
        origins=origins,
        palette=Markup(plots.palette()),
        levels=LEVELS,
        room=EXAMPLE_BYTES // len(models),
        number=_is_number,
    )


def _is_number(cell: str) -> bool:
    """Whether a table cell is a number, which the page aligns to the right."""
    return bool(re.match(r"^[\d.,]+x?( ± [\d.,]+x?)?$", cell))


def _markdown(models: list[Model], origins: Origins, images: dict[str, Path]) -> str:
    parts = []
    for model in models:
        parts += [f"# {model.title}", f"![Quality of {model.title} against compute]({images[model.name].name})"]
        parts += [_markdown_table(model.quality_table())]
        if model.ways():
            parts.append(_markdown_table(model.speed_table()))
    if origins.failures:
        parts += ["# Points that failed", "\n".join(f"- `{point}`: {reason}" for point, reason in origins.failures)]
    parts.append("# Where the numbers come from")
    parts += [f"C{number}: `{command}`" for number, command in enumerate(origins.commands, 1)]
    parts += [f"E{number}: {text}" for number, text in enumerate(origins.surroundings, 1)]
    parts.append(_markdown_table(origins.table()))
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(table.header), "|" + "---|" * len(table.header), *map(line, table.rows)])


def _csv(rows: list[Row]) -> str:
    """Return all rows as CSV with one column per value; columns of timings begin with the name of the timed pass."""
    flat = []
    for row in rows:
        cells = {key: value for key, value in row.items() if not isinstance(value, dict | list | SweepFolder)}
        cells["folder"] = str(row["folder"].folder)
        cells |= {f"{name} version": value for name, value in row["versions"].items()}
        cells |= {f"machine {name}": value for name, value in row["machine"].items()}
        for way, part in benched(row).items():
            cells |= {f"{way}: {key}": part[key] for key in ("predicted_speedup", "measured_speedup", "seconds")}
        flat.append(cells)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for cells in flat for key in cells)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()
