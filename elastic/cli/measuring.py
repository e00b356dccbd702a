"""Commands that measure finished runs: eval, bench, compare."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from typing import Any

from elastic.cli.screen import print_rows, screen


def eval_command(options: argparse.Namespace) -> None:
    if options.tasks is not None:
        return _eval_tasks(options)
    if options.limit is not None:
        raise ValueError("--limit is for --tasks: leave it away")
    from elastic.evaluate import measure_run

    with screen() as (say, _):
        rows = measure_run(
            options.run, data=options.data, compute=options.compute, baselines=options.baselines, say=say
        )
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        print_rows(rows)


def _eval_tasks(options: argparse.Namespace) -> None:
    if options.data or options.baselines:
        raise ValueError(
            "--tasks brings its own data and measures teacher and student: leave --data and --baselines away"
        )
    if options.limit is not None and options.limit < 1:
        raise ValueError("--limit must be at least 1")
    if find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install 'elastic-distill[tasks]'")
    from elastic.tasks import score_run

    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    with screen() as (say, _):
        rows = score_run(options.run, names, compute=options.compute, limit=options.limit, say=say)
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    from rich.console import Console
    from rich.table import Table

    def accuracy(row: dict[str, Any], key: str) -> str:
        error = f" ± {row[f'{key}_stderr']:.2%}" if f"{key}_stderr" in row else ""
        return f"{row[key]:.2%}{error}" if key in row else ""

    table = Table("task", "examples", "asked", "decode", "prefill", "agreement")
    columns = "accuracy", "teacher_accuracy", "accuracy_norm", "teacher_accuracy_norm"
    for key in columns:
        table.add_column(key.replace("_", " "))
    for r in rows:
        spent = (f"{r[key]:.3f}" for key in ("compute_target", "compute", "compute_prefill"))
        numbers = f"{r['examples']:,}", *spent, f"{r['agreement']:.2%}"
        table.add_row(r["task"], *numbers, *(accuracy(r, key) for key in columns))
    Console(width=160).print(table)


def bench_command(options: argparse.Namespace) -> None:
    from elastic.bench import bench_run

    for name in ("batch", "tokens", "repeats"):
        given = getattr(options, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            raise ValueError(f"--{name} must be at least 1")
    if options.new_tokens is not None and options.new_tokens < 2:
        raise ValueError("--new-tokens must be at least 2: the first one is not timed")
    with screen() as (say, _):
        rows = bench_run(
            options.run,
            compute=options.compute,
            batch=options.batch,
            tokens=options.tokens,
            new_tokens=options.new_tokens,
            repeats=options.repeats,
            say=say,
        )
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    from rich.console import Console
    from rich.table import Table

    def speed(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}x"

    table = Table(
        "phase", "batch", "tokens", "compute", "predicted", "by bytes", "measured", "efficiency", "tuned", "ms"
    )
    table.add_column("dense ms")
    table.add_column("cache MB")
    table.add_column("dense MB")
    table.add_column("peak GB")
    table.add_column("dense GB")
    for r in rows:
        caches = (f"{r[k] / 1e6:.2f}" if k in r else "" for k in ("cache_bytes", "dense_cache_bytes"))
        speeds = (speed(r.get(k)) for k in ("predicted_speedup", "predicted_speedup_bytes", "measured_speedup"))
        numbers = f"{r['batch']}", f"{r['tokens']}", f"{r['compute']:.3f}", *speeds, f"{r['efficiency']:.2f}"
        times = (f"{1000 * r[k]:,.1f}" for k in ("seconds", "dense_seconds"))
        peaks = (f"{r[k] / 1e9:.2f}" for k in ("peak_bytes", "dense_peak_bytes"))
        table.add_row(r["phase"], *numbers, speed(r.get("tuned_speedup")), *times, *caches, *peaks)
    Console(width=160).print(table)
    train = rows[-1]
    print(
        f"{train['threads']} threads, {train['dtype']}; dense: the model as its library ships it (training: a teacher "
        f"forward; a step costs {train['teacher_forwards']:.2f} of them, ideal {train['ideal_teacher_forwards']:.2f})\n"
        f"peak: memory in use while the one or the other ran, both loaded; weights {train['weight_bytes'] / 1e9:.2f} GB"
    )


def compare_command(options: argparse.Namespace) -> None:
    from elastic.evaluate import compare_runs

    rows = compare_runs(options.run, options.other, data=options.data)
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("router", "rank correlation of scores")
    for row in rows:
        table.add_row(row["router"], f"{row['correlation']:.3f}")
    Console().print(table)
