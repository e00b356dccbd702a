"""Commands that show results, text and tables: report, generate, info, models."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from shlex import quote
from typing import TYPE_CHECKING

from elastic.cli.screen import print_rows, screen
from elastic.files import require_run

if TYPE_CHECKING:
    from students import RouterSpec


def report_command(options: argparse.Namespace) -> None:
    """`elastic report`: write the report of sweeps, and print the paths of its files."""
    from elastic.reporting.report import report

    for path in report(options.folders, options.output):
        print(path)


def generate_command(options: argparse.Namespace) -> None:
    """`elastic generate`: print the continuation of a prompt, and on stderr its speed and compute."""
    require_run(options.run, finished=True)
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError("--max-new-tokens must be at least 1")
    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("--prompt has bytes that are no text in this locale: set LC_ALL=C.UTF-8") from None
    from elastic.generate import generate_text
    from teachers.wording import number_of

    def write(text: str) -> None:
        print(text, end="", flush=True)

    with screen() as (say, _):
        result = generate_text(
            options.run,
            options.prompt,
            image=options.image,
            compute=options.compute,
            max_new_tokens=options.max_new_tokens,
            lossless=options.lossless,
            stream=write if options.stream else None,
        )
        print("" if options.stream else result["text"])
        if result["full"]:
            say("stopped: the model has no position for another token")
        each = result["tokens_per_verification"]
        kept = "" if each is None else f"{each:.2f} tokens per verification, "
        speed = f"{number_of(result['tokens'], 'tokens')}, {result['tokens_per_second']:.1f} tokens/s"
        say(f"{speed}, {kept}compute {result['compute']:.3f}")


def info_command(options: argparse.Namespace) -> None:
    """`elastic info`: print a run's model, routers, data, versions and results, or with --json all that is recorded."""
    require_run(options.run)
    from elastic.run import Run
    from elastic.settings import to_dict

    run = Run.open(options.run)
    about, config = run.about, run.config
    if options.json:
        print(json.dumps({"run": str(run.folder), **about, "config": to_dict(config)}))
        return
    from rich.console import Console
    from rich.table import Column, Table

    from teachers.wording import number_of

    rows = about.get("results", [about["result"]] if "result" in about else [])  # runs of earlier versions have one
    steps = about.get("steps", config.train.steps)
    minutes = f"{config.train.minutes} min"
    took = f", {about['seconds'] / 60:.1f} min" if "seconds" in about else ""
    unfinished = "" if rows else f", not finished: elastic distill --resume {quote(str(run.folder))}"
    lines = [
        ("run", f"{run.folder}{unfinished}"),
        ("model", f"{config.model} ({about['identity']})"),
        ("weights", about["source"]),
        ("quantization", config.quantization),
        ("preset", config.preset),
        ("target compute", f"{config.budget.target} ({config.budget.phase})"),
        *(("router", _router(router)) for router in config.student.routers),
        ("corrections", f"LoRA of rank {config.student.lora.rank}" if config.student.lora.rank else "none"),
        ("data", f"{config.data.source}, {config.data.held_out} held out"),
        ("training", f"{number_of(steps, 'steps')} of {config.train.batch}{took}" if steps else minutes),
        *(
            (part, ", ".join(f"{name} {value}" for name, value in about.get(part, {}).items()))
            for part in ("versions", "machine")
        ),
    ]
    table = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
    for name, text in lines:
        if text != "none":
            table.add_row(name, text)
    Console(markup=False, highlight=False).print(table)
    if rows:
        print_rows(rows, run.folder / "elastic.json")


def _router(router: RouterSpec) -> str:
    """Return a router's kind, places, and settings that are not the defaults."""
    places = f"{router.blocks} blocks" if router.of_kind.place == "block" else ""
    places = f"{', '.join(router.where)} of {places}" if router.where else places
    changed = [
        f"{field.name} {getattr(router, field.name)}"
        for field in fields(router)
        if field.name not in ("kind", "sites", "blocks", "optional") and getattr(router, field.name) != field.default
    ]
    places += " where the model has experts" * router.optional
    return "; ".join(part for part in (router.kind, places, *changed) if part)


def models_command(options: argparse.Namespace) -> None:
    """`elastic models`: list the models that have a short name."""
    from teachers.registry import models

    entries = models().values()
    if options.json:
        rows = [{"name": e.name, "hub": e.hub, "parameters": e.parameters, "license": e.license} for e in entries]
        print(json.dumps({"rows": rows}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "hub id", "parameters", "license", "note", box=None, pad_edge=False)
    for entry in entries:
        table.add_row(entry.name, entry.hub or "(shipped)", _count(entry.parameters), entry.license, entry.note)
    Console(width=160).print(table)  # wide, so that names can be copied whole in a narrow terminal
    print("Any other hub id or local folder of a supported architecture works too.")


def _count(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number / 1e9:.1f} B" if number >= 999.5e6 else f"{number / 1e6:.0f} M"
