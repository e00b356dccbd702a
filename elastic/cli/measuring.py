"""Commands that measure or estimate: eval, bench, plan, compare."""

from __future__ import annotations

import argparse
import json
from functools import partial
from importlib.util import find_spec
from typing import Any

from elastic import launch
from elastic.cli.screen import print_rows, screen
from elastic.files import require_run
from elastic.harness.names import require_known


def eval_command(options: argparse.Namespace) -> None:
    """`elastic eval`: measure a finished run on data, or on tasks of lm-evaluation-harness."""
    launch.in_step(partial(_check_eval, options))
    lost: dict[str, ValueError] = {}
    with screen() as (say, _):
        if options.tasks is None:
            from elastic.evaluate import measure_run

            given = {"data": options.data, "baselines": options.baselines, "failed": lost.__setitem__}
            rows = measure_run(options.run, compute=options.compute, **given, say=say)
        else:
            from elastic.tasks import score_run

            given = {"compute": options.compute, "limit": options.limit}
            rows = launch.in_step(partial(score_run, options.run, _names(options), **given, say=say))
    if not launch.is_main():
        return
    if options.json:
        print(json.dumps({"rows": rows}))
    elif options.tasks is None:
        print_rows(rows)
    else:
        _print_accuracies(rows)
    if lost:
        raise ValueError("; ".join(f"no baseline {name}: {error}" for name, error in lost.items()))


def _check_eval(options: argparse.Namespace) -> None:
    """Raise ValueError if options of `elastic eval` contradict each other, or what they name is missing."""
    require_run(options.run, finished=True)
    if options.tasks is None:
        if options.limit is not None:
            raise ValueError("--limit is for --tasks: leave it away")
        return
    if options.data or options.baselines:
        raise ValueError(
            "--tasks brings its own data and measures teacher and student: leave --data and --baselines away"
        )
    if options.limit is not None and options.limit < 1:
        raise ValueError("--limit must be at least 1")
    if find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install 'elastic-distill[tasks]'")
    require_known(_names(options))


def _names(options: argparse.Namespace) -> list[str]:
    """Return the items of --tasks, each once."""
    return list(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))


def _print_accuracies(rows: list[dict[str, Any]]) -> None:
    """Print the table of accuracies on tasks, with their standard errors."""
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
    """`elastic bench`: time a finished run, or a shape with random weights."""
    _check_bench(options)
    from datetime import date

    if options.model is not None:
        from elastic.shape_config import shape_config

        config = shape_config(
            options.model, preset=options.preset, settings=options.set, budget__target=options.target_compute
        )
    from elastic.bench import Stopped, bench_run
    from elastic.shapes import bench_shape
    from elastic.surroundings import surroundings

    work = {
        name: getattr(options, name) for name in ("compute", "batch", "tokens", "new_tokens", "repeats", "lossless")
    }
    stopped = None
    with screen() as (say, _):
        try:
            if options.model is None:
                rows = bench_run(options.run, **work, say=say)
            else:
                rows = bench_shape(config, **work, say=say)
        except Stopped as interruption:
            rows, stopped = interruption.rows, interruption
    timed = options.run or f"{options.model}, random weights"
    about = {"date": date.today().isoformat(), "timed": timed, **surroundings()}
    if options.json:
        print(json.dumps({**about, "rows": rows}))
    else:
        _print_timings(rows, about)
    if stopped is not None:
        raise stopped


def _check_bench(options: argparse.Namespace) -> None:
    """Raise ValueError if options of `elastic bench` contradict each other or are too small."""
    for name in ("batch", "tokens", "repeats"):
        given = getattr(options, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            raise ValueError(f"--{name} must be at least 1")
    if options.new_tokens is not None and options.new_tokens < 2:
        raise ValueError("--new-tokens must be at least 2: the first one is not timed")
    if (options.run is None) == (options.model is None):
        raise ValueError("bench times a finished run (elastic bench RUN) or a shape (--model SHAPE --random-weights)")
    if options.model is None:
        named = ("random_weights", "target_compute", "preset", "set")
        given = ["--" + name.replace("_", "-") for name in named if getattr(options, name)]
        if given:
            raise ValueError(f"a run was made with its own configuration: leave {', '.join(given)} away")
        require_run(options.run, finished=True)
    elif not options.random_weights:
        raise ValueError(
            f"--model {options.model} would be timed without training it: add --random-weights, or distill a run first"
        )


SIZES = {
    "student ms": ("seconds", 1e-3),
    "lossless ms": ("lossless_seconds", 1e-3),
    "tuned ms": ("tuned_seconds", 1e-3),
    "dense ms": ("dense_seconds", 1e-3),
    "ToMe ms": ("tome_seconds", 1e-3),
    "cache MB": ("cache_bytes", 1e6),
    "dense MB": ("dense_cache_bytes", 1e6),
    "peak GB": ("peak_bytes", 1e9),
    "dense GB": ("dense_peak_bytes", 1e9),
}
"""Columns of the table of timings: heading -> (key of a row, its unit). A column that no row has is left out."""


def _print_timings(rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Print the table of timings, with the machine and versions that they were measured on."""
    from rich.console import Console
    from rich.table import Table

    from teachers.wording import number_of

    def speed(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}x"

    machine, versions = about["machine"], about["versions"]
    first, last = rows[0], rows[-1]
    names = "elastic-distill", "torch", "transformers"
    print(f"{about['timed']}; {first['preset']}, {first['dtype']}; {about['date']}")
    print(
        f"{machine.get('device', machine['processor'])}, {number_of(machine['threads'], 'threads')}; "
        + ", ".join(f"{name} {versions[name]}" for name in names)
    )
    if "replaced_kernels" in machine:
        print(f"torch's operators, which are slower, in place of the kernels of {machine['replaced_kernels']}")
    columns = "phase", "batch", "tokens", "compute", "by FLOPs", "by bytes", "measured", "efficiency", "tuned"
    sizes = {name: size for name, size in SIZES.items() if any(size[0] in r for r in rows)}
    table = Table(*columns, *sizes, box=None, pad_edge=False)
    for r in rows:
        speeds = (speed(r.get(k)) for k in ("predicted_speedup", "predicted_speedup_bytes", "measured_speedup"))
        numbers = f"{r['batch']}", f"{r['tokens']}", f"{r['compute']:.3f}", *speeds, f"{r['efficiency']:.2f}"
        own = (f"{r[key] / unit:,.2f}" if key in r else "" for key, unit in sizes.values())
        table.add_row(r["phase"], *numbers, speed(r.get("tuned_speedup")), *own)
    Console(width=160).print(table)
    print(
        "compute: FLOPs over the dense model's; by FLOPs, by bytes: the speed-up that either predicts; efficiency: "
        "measured over the first\n"
        "dense: the model as its library ships it; tuned: with all of the student's execution but routing\n"
        "peak: memory in use while the one or the other ran, all loaded"
    )
    if first["phase"] == "prefill":
        print("prefill: as generate reads a prompt, whose last token alone enters the LM head")
    if "lossless ms" in sizes:
        print("lossless: the student drafts and the dense model verifies, whose text it is")
    if "ToMe ms" in sizes:
        print(
            "ToMe: the dense model with ToMe's merging (arXiv 2210.09461) at the student's FLOPs, run as the student is"
        )
    if last["phase"] == "train":
        print(
            f"training: against a teacher forward; a step costs {last['teacher_forwards']:.2f} of them, ideal "
            f"{last['ideal_teacher_forwards']:.2f}, from a teacher cache {last['cached_teacher_forwards']:.2f}; "
            f"weights {last['weight_bytes'] / 1e9:.2f} GB"
        )


def plan_command(options: argparse.Namespace) -> None:
    """`elastic plan`: estimate memory, FLOPs and days of training."""
    from elastic.shape_config import plan_config

    config = plan_config(options.model, preset=options.preset, settings=options.set)
    from elastic.plan import plan

    amount = {name: given for name in ("tokens", "samples") if (given := getattr(options, name)) is not None}
    machines = {name: getattr(options, name) for name in ("gpus", "memory", "peak", "share")}
    found = plan(config, amount=amount, **machines)
    if options.json:
        print(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    from teachers.wording import number_of

    table = Table(show_header=False)
    table.add_row("model, preset", f"{found['model']}, {found['preset']}")
    table.add_row("parameters", f"{found['parameters']:,}, of routers {found['trainable_parameters']:,}")
    for name, what in (
        ("weights", "frozen weights, bfloat16"),
        ("routers", "routers, gradients, Adam"),
        ("activations", "a step's activations"),
        ("calibration", "or calibration's"),
        ("needed", f"needed of {options.memory:g} GB"),
    ):
        table.add_row(what, f"{_size(found[name])} a GPU")
    table.add_row("fits", "yes" if found["fits"] else "no: every GPU has all weights")
    if options.gpus > 1:
        spread = found["spread"]
        parts = f"{_size(spread['needed'])} a GPU, of weights {_size(spread['weights'])}"
        table.add_row(f"spread over {options.gpus}", f"{parts}: {'fits' if spread['fits'] else 'does not fit'}")
    samples, length = number_of(found["batch"], found["unit"]), number_of(found["length"], "tokens")
    table.add_row("a step", f"{samples} of {length}, {found['rows']:,} a GPU")
    table.add_row("FLOPs", f"{found['flops_per_token']:.3g} a token, {found['step_flops']:.3g} a step")
    reached = f"{options.share:.0%} of {options.peak:g} TFLOP/s a GPU"
    table.add_row("seconds a step", f"{found['step_seconds']:.3g} at {reached}")
    trained = f"{number_of(round(found['samples']), found['unit'])}, {found['tokens']:.3g} tokens"
    table.add_row(trained, f"{number_of(found['steps'], 'steps')}, {_duration(found['days'])}")
    Console(soft_wrap=True, markup=False).print(table)


def _size(count: float) -> str:
    """Return a number of bytes as text, in GB from 0.01 GB on, else in MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"


def _duration(days: float) -> str:
    """Return a number of days as text in the largest unit of which it is at least 1, such as "3.1 hours"."""
    size, unit = next(((s, u) for s, u in ((1, "days"), (24, "hours")) if days * s >= 1), (24 * 60, "minutes"))
    return f"{days * size:.3g} {unit}"


def compare_command(options: argparse.Namespace) -> None:
    """`elastic compare`: rank correlations of the router scores of two runs of an image model."""
    for run in (options.run, options.other):
        require_run(run, finished=True)
    from elastic.evaluate import compare_runs

    with screen():
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
