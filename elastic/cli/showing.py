"""Commands that show results, text and tables: report, generate, info, models."""

from __future__ import annotations

import argparse
import json

from elastic.cli.screen import screen


def report_command(options: argparse.Namespace) -> None:
    """`elastic report`: write the report of sweeps, and print the paths of its files."""
    from elastic.reporting.report import report

    for path in report(options.folders, options.output):
        print(path)


def generate_command(options: argparse.Namespace) -> None:
    """`elastic generate`: print the continuation of a prompt, and on stderr its speed and compute."""
    from elastic.generate import generate_text

    if options.max_new_tokens < 1:
        raise ValueError("--max-new-tokens must be at least 1")

    def write(text: str) -> None:
        print(text, end="", flush=True)

    with screen() as (say, _):
        result = generate_text(
            options.run,
            options.prompt,
            image=options.image,
            compute=options.compute,
            max_new_tokens=options.max_new_tokens,
            stream=write if options.stream else None,
        )
        print("" if options.stream else result["text"])
        if result["full"]:
            say("stopped: the model has no position for another token")
        say(f"{result['tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s, compute {result['compute']:.3f}")


def info_command(options: argparse.Namespace) -> None:
    """`elastic info`: print elastic.json and the configuration of a run as YAML."""
    import yaml

    from elastic.run import Run
    from elastic.settings import to_dict

    run = Run.open(options.run)
    print(yaml.safe_dump({"run": str(run.folder), **run.about, "config": to_dict(run.config)}, sort_keys=False), end="")


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
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"
